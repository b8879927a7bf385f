package servertest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Redis is a redis-server process.
type Redis struct {
	// URL is its store URL.
	URL string

	command *exec.Cmd
}

// RequireRedis skips the test if redis-server is not installed. In CI it fails the test instead.
func RequireRedis(tb testing.TB) {
	tb.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" {
			tb.Fatal(err)
		}
		tb.Skip(err)
	}
}

// LaunchRedis starts a redis-server without persistence on a free port. Its working directory is folder.
func LaunchRedis(folder string) (*Redis, error) {
	// Another process may take the port before Redis binds it. Redis then exits, and the loop tries another port.
	for range 10 {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		command := exec.Command("redis-server", "--port", fmt.Sprint(port), "--bind", "127.0.0.1", "--dir", folder,
			"--save", "", "--appendonly", "no")
		if err := command.Start(); err != nil {
			return nil, err
		}
		exited := make(chan struct{})
		go func() {
			_ = command.Wait()
			close(exited)
		}()
		address := fmt.Sprintf("127.0.0.1:%d", port)
		if answers(address, exited) {
			return &Redis{URL: "redis://" + address + "/0", command: command}, nil
		}
		_ = command.Process.Kill()
		<-exited
	}
	return nil, errors.New("redis-server did not start")
}

// Kill kills the server.
func (r *Redis) Kill() { _ = r.command.Process.Kill() }

func freePort() (int, error) {
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer func() { _ = probe.Close() }()
	return probe.Addr().(*net.TCPAddr).Port, nil
}

func answers(address string, exited <-chan struct{}) bool {
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); {
		select {
		case <-exited:
			return false
		case <-time.After(5 * time.Millisecond):
		}
		if ping(address) {
			return true
		}
	}
	return false
}

func ping(address string) bool {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	reply := make([]byte, 64)
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		return false
	}
	n, err := conn.Read(reply)
	return err == nil && strings.HasPrefix(string(reply[:n]), "+PONG")
}
