// Package servertest starts the real service, a real Redis and a proxy that can drop replies.
package servertest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const startTimeout = 30 * time.Second

// Server is a process of the real service.
type Server struct {
	// Target is the address the service listens on.
	Target string

	command *exec.Cmd
	exited  chan struct{}
}

// Start starts the service on a free port. The service stops when the test ends.
func Start(tb testing.TB, storeURL string, arguments ...string) *Server {
	tb.Helper()
	s, err := Launch(storeURL, arguments...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Kill)
	return s
}

// Launch starts the service on a free port. DEDUP_TEST_PYTHON names its Python; the default is the repository's .venv.
func Launch(storeURL string, arguments ...string) (*Server, error) {
	python := os.Getenv("DEDUP_TEST_PYTHON")
	if python == "" {
		root, err := moduleRoot()
		if err != nil {
			return nil, err
		}
		python = filepath.Join(root, "..", "..", ".venv", "bin", "python")
	}
	arguments = append([]string{"-m", "dedup_service", "serve", "--listen", "127.0.0.1:0", "--store-url", storeURL}, arguments...)
	s := &Server{command: exec.Command(python, arguments...), exited: make(chan struct{})}
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "DEDUP_") {
			s.command.Env = append(s.command.Env, variable)
		}
	}
	stderr, err := s.command.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.command.Start(); err != nil {
		return nil, fmt.Errorf("start the service (DEDUP_TEST_PYTHON names its Python): %w", err)
	}
	serving := make(chan string, 1)
	var output strings.Builder // output until the service listens, for the error if it never does
	go func() {
		defer close(s.exited)
		started := false
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			var line struct {
				Event     string
				Addresses []string
			}
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Event == "server_started" && len(line.Addresses) > 0 {
				started = true
				serving <- line.Addresses[0]
			} else if !started {
				output.WriteString(lines.Text() + "\n")
			}
		}
		_ = s.command.Wait()
	}()
	select {
	case s.Target = <-serving:
		return s, nil
	case <-s.exited:
		return nil, fmt.Errorf("the service exited during start-up:\n%s", output.String())
	case <-time.After(startTimeout):
		s.Kill()
		return nil, fmt.Errorf("the service did not listen within %v", startTimeout)
	}
}

// Kill kills the service and waits for its exit.
func (s *Server) Kill() {
	_ = s.command.Process.Kill()
	<-s.exited
}

func moduleRoot() (string, error) {
	folder, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
			return folder, nil
		}
		parent := filepath.Dir(folder)
		if parent == folder {
			return "", errors.New("the tests run outside their module: no go.mod found")
		}
		folder = parent
	}
}

// Shared is a service that the tests of a package share. The first Get starts it.
type Shared struct {
	once   sync.Once
	server *Server
	err    error
}

// Get returns the service or fails the test.
func (s *Shared) Get(tb testing.TB, storeURL func() (string, error)) *Server {
	tb.Helper()
	s.once.Do(func() {
		var url string
		if url, s.err = storeURL(); s.err == nil {
			s.server, s.err = Launch(url)
		}
	})
	if s.err != nil {
		tb.Fatal(s.err)
	}
	return s.server
}

// Kill kills the service if it was started.
func (s *Shared) Kill() {
	if s.server != nil {
		s.server.Kill()
	}
}

// Eventually waits until the condition holds. It fails the test after 30 seconds.
func Eventually(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(startTimeout); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("never happened: %s", what)
		}
	}
}
