package servertest

import (
	"io"
	"net"
	"sync"
	"testing"
)

// Proxy forwards bytes between clients and a server, and can drop replies.
type Proxy struct {
	// Target is the address the proxy listens on.
	Target string

	listener net.Listener
	mu       sync.Mutex
	upstream string
	swallow  bool
	open     map[net.Conn]struct{}
}

// StartProxy starts a proxy for upstream on a free port. The proxy stops when the test ends.
func StartProxy(tb testing.TB, upstream string) *Proxy {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{
		Target: listener.Addr().String(), listener: listener, upstream: upstream, open: map[net.Conn]struct{}{},
	}
	go p.accept()
	tb.Cleanup(func() {
		_ = listener.Close()
		p.Cut()
	})
	return p
}

// SetUpstream forwards new connections to another server.
func (p *Proxy) SetUpstream(upstream string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.upstream = upstream
}

// SwallowReplies(true) drops everything the server sends, until SwallowReplies(false). Requests still arrive.
func (p *Proxy) SwallowReplies(swallow bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swallow = swallow
}

// Cut closes every open connection.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.open {
		_ = conn.Close()
	}
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		go p.serve(client)
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer func() { _ = client.Close() }()
	p.mu.Lock()
	upstream := p.upstream
	p.mu.Unlock()
	server, err := net.Dial("tcp", upstream)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	p.track(client, server)
	defer p.forget(client, server)
	go func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := server.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		swallow := p.swallow
		p.mu.Unlock()
		if swallow {
			continue
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (p *Proxy) track(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range conns {
		p.open[conn] = struct{}{}
	}
}

func (p *Proxy) forget(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range conns {
		delete(p.open, conn)
	}
}
