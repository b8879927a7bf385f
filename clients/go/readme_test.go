package dedup_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A module that follows the README's lines for a clone builds against this folder.
func TestReadmeReplaceLinesBuildAgainstAClone(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```console\n(go mod edit .*?)\ngo mod tidy\n```").FindSubmatch(readme)
	if block == nil {
		t.Fatal("README.md has no block of go mod edit lines that ends with go mod tidy")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	app := filepath.Join(folder, "app")
	if err := os.Mkdir(app, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(root, filepath.Join(folder, "dedup-service")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(app, "go.mod"), "module example.com/app\n\ngo 1.24.0\n")
	writeFile(t, filepath.Join(app, "main.go"), `package main

import dedup "github.com/dedup-service/dedup-service/clients/go"

func main() { _, _ = dedup.New("127.0.0.1:50051") }
`)
	// go mod tidy needs the network for the tests of dependencies. The checksums of this module and -mod=mod do not.
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(app, "go.sum"), string(sums))
	for _, line := range append(strings.Split(string(block[1]), "\n"), "go build -mod=mod -o app .") {
		words := strings.Fields(line)
		command := exec.Command(words[0], words[1:]...)
		command.Dir = app
		command.Env = append(os.Environ(), "GOPROXY=off", "GOFLAGS=-buildvcs=false", "GOWORK=off")
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, output)
		}
	}
}
