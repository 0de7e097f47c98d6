package faults

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// acl is what the service needs of a Redis user, as documented.
const acl = "resetkeys ~requestcount -@all +eval +evalsha +hmget +hset +hsetnx +hgetall"

const password = "right" // of the default user

// redisServer is the program that plays Redis; it may be one as old as 6.0.
var redisServer = cmp.Or(os.Getenv("REDIS_SERVER"), "redis-server")

// A server is a redis-server process on loopback. Its default user has what
// acl gives; the user admin, with the password admin, has everything.
type server struct {
	t      testing.TB
	port   string
	conf   string
	cmd    *exec.Cmd
	log    bytes.Buffer
	kills  []span
	client *redis.Client // of admin, on one connection
}

// A span is some time, since epoch.
type span struct{ start, end time.Duration }

// startServer starts a redis-server with further lines of configuration.
func startServer(t testing.TB, conf ...string) *server {
	s := &server{t: t, port: freePort()}
	s.conf = fmt.Sprintf(`bind 127.0.0.1
port %s
dir %s
save ""
appendonly no
user default on >%s %s
user admin on >admin ~* +@all
masteruser admin
masterauth admin
%s
`, s.port, t.TempDir(), password, acl, strings.Join(conf, "\n"))
	s.client = s.newClient()
	t.Cleanup(func() { s.client.Close() })
	t.Cleanup(s.kill)
	s.start()
	return s
}

// startRedis starts a Redis, and returns the setting that has an instance use it.
func startRedis(t testing.TB) (*server, string) {
	s := startServer(t)
	return s, "REDIS_URL=redis://:" + password + "@" + s.addr()
}

// startTLS starts a redis-server that also has TLS, at port, with the
// certificate and key in file.
func startTLS(t testing.TB, port, file string) *server {
	return startServer(t, "tls-port "+port, "tls-cert-file "+file, "tls-key-file "+file,
		"tls-auth-clients no")
}

func (s *server) newClient() *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: s.addr(), Username: "admin", Password: "admin",
		Protocol: 2, DisableIdentity: true, // RESP3 and identities are for newer servers
		PoolSize: 1, ReadTimeout: 20 * time.Second,
	})
}

func (s *server) start() {
	s.cmd = exec.Command(redisServer, "-")
	s.cmd.Stdin = strings.NewReader(s.conf)
	s.log.Reset()
	s.cmd.Stdout = &s.log
	if err := startCommand(s.cmd); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, func() error { return listens(s.addr()) })
}

// kill ends the server as a crash would.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	killed := span{start: time.Since(epoch)}
	s.cmd.Process.Kill()
	s.cmd.Wait()
	killed.end = time.Since(epoch)
	s.kills = append(s.kills, killed)
	if s.t.Failed() {
		s.t.Logf("the end of redis-server's log:\n%s", tail(s.log.String()))
	}
}

// restart kills the server and starts it again, empty, after a while.
func (s *server) restart(after time.Duration) {
	s.kill()
	time.Sleep(after)
	s.start()
}

// suspend stops the server's process for a while.
func (s *server) suspend(d time.Duration) {
	s.cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(d)
	s.cmd.Process.Signal(syscall.SIGCONT)
}

func (s *server) addr() string { return "127.0.0.1:" + s.port }

// do returns what the command, a sentence, is answered.
func (s *server) do(command string) string {
	s.t.Helper()
	var args []any
	for _, word := range strings.Fields(command) {
		args = append(args, word)
	}
	reply, err := s.client.Do(context.Background(), args...).Result()
	if err != nil && err != redis.Nil {
		s.t.Fatalf("%.200s: %v", command, err)
	}
	return fmt.Sprint(reply)
}

// stat returns the number after name in INFO.
func (s *server) stat(name string) (n int) {
	s.t.Helper()
	_, value, _ := strings.Cut(s.do("INFO ALL"), name)
	value, _, _ = strings.Cut(value, ",")
	if _, err := fmt.Sscan(value, &n); err != nil {
		s.t.Fatalf("INFO: got no number %s: %v", name, err)
	}
	return n
}

// configure changes a setting, and skips the test where the server does not know it.
func (s *server) configure(setting, value string) {
	if !strings.Contains(s.do("CONFIG GET "+setting), setting) {
		s.t.Skipf("skipped: no setting %s in this version of Redis", setting)
	}
	s.do("CONFIG SET " + setting + " " + value)
}

// until waits for what Redis takes some time for.
func (s *server) until(command, says string) {
	s.t.Helper()
	eventually(s.t, func() error {
		if got := s.do(command); !strings.Contains(got, says) {
			return fmt.Errorf("%s: got %s, want %s", command, got, says)
		}
		return nil
	})
}

// tail returns the last 20 lines of text.
func tail(text string) string {
	lines := strings.Split(text, "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// A fault is what a proxy does to a connection.
type fault int

const (
	none   fault = iota
	refuse       // it is reset
	vanish       // nothing passes in either direction
	hold         // nothing passes until the fault ends; then all does, late
)

// A proxy passes bytes between clients and Redis, and has faults to order.
type proxy struct {
	net.Listener

	mu     sync.Mutex
	moved  *sync.Cond // a fault
	target string
	fault  fault // of connections to come
	links  map[*link]bool
}

// A link is a connection through a proxy.
type link struct {
	*net.TCPConn
	fault fault
}

func newProxy(t testing.TB, target string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, target: target, links: map[*link]bool{}}
	p.moved = sync.NewCond(&p.mu)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(nc.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close(); p.set(refuse); wg.Wait() })
	return p
}

// set orders a fault for all connections, also those to come.
func (p *proxy) set(f fault) {
	p.setComing(f)
	p.setOpen(f)
}

// setComing orders a fault for connections to come, and for none that is open.
func (p *proxy) setComing(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

// setOpen orders a fault for the connections that are open, and for none to come.
func (p *proxy) setOpen(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.fault = f
		if f == refuse {
			l.reset()
		}
	}
	p.moved.Broadcast()
}

func (l *link) reset() {
	l.SetLinger(0)
	l.Close()
}

// redirect hands the address over to another server.
func (p *proxy) redirect(target string) {
	p.mu.Lock()
	p.target = target
	p.mu.Unlock()
	p.setOpen(refuse)
}

func (p *proxy) serve(down *net.TCPConn) {
	p.mu.Lock()
	l, target := &link{down, p.fault}, p.target
	p.links[l] = true
	if l.fault == refuse {
		l.reset()
	}
	p.mu.Unlock()
	if up, err := net.Dial("tcp", target); err == nil {
		var wg sync.WaitGroup
		wg.Go(func() { p.copy(up, down, l) })
		wg.Go(func() { p.copy(down, up, l) })
		wg.Wait()
	}
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
	down.Close()
}

// copy passes what comes from one side of a link to the other, unless it is to suffer a fault.
func (p *proxy) copy(to, from net.Conn, l *link) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		for l.fault == hold {
			p.moved.Wait()
		}
		f := l.fault
		p.mu.Unlock()
		if n > 0 && f != vanish {
			to.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// certificate returns a file with a new certificate for 127.0.0.1, and its key.
func certificate(t testing.TB) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter:     time.Now().Add(time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "redis.pem")
	pair := slices.Concat(
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	if err := os.WriteFile(file, pair, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
