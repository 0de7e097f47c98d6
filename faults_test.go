package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// These tests start real redis-servers and the built binary, three instances
// of it under load, and break them: `make faults`.

// acl is what the service needs of a Redis user on its two keys, with +select
// for a database other than 0, and PING for health checks and GET for people.
// Compose and the chart give the same.
const acl = "-@all +ping +auth +script|load +evalsha +get +incrby +hget +hset +hdel"

func TestACLIsTheSameEverywhere(t *testing.T) {
	t.Parallel()
	plain := strings.NewReplacer("'", "", "- ", "") // without YAML's quotes and list items
	for _, file := range []string{"docker-compose.yml", "helm/templates/redis-deployment.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if words := strings.Fields(plain.Replace(string(text))); !strings.Contains(strings.Join(words, " "), " resetchannels "+acl+" ") {
			t.Errorf("%s does not give its Redis user %s", file, acl)
		}
	}
}

// needServers skips the test unless it can start what it needs.
func needServers(t *testing.T) {
	t.Helper()
	if program == "" {
		t.Skip("skipped: runs the built binary, at $PROGRAM: make faults")
	}
	needPrograms(t, "redis-server", "redis-cli")
	t.Parallel()
}

func needPrograms(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("skipped: %s is missing", name)
		}
	}
}

// A server is a redis-server process on loopback. Its default user has what
// acl gives; the user admin, with the password admin, has everything.
type server struct {
	t    testing.TB
	port string
	conf string
	cmd  *exec.Cmd
}

// startServer starts a redis-server, with "nopass" or ">password" for its
// default user and further lines of configuration.
func startServer(t testing.TB, credential string, conf ...string) *server {
	s := &server{t: t, port: freePort()}
	s.conf = fmt.Sprintf(`bind 127.0.0.1
port %s
dir %s
save ""
appendonly no
user default on %s resetkeys ~requestcount ~{requestcount}:instances resetchannels %s
user admin on >admin ~* &* +@all
masteruser admin
masterauth admin
%s
`, s.port, t.TempDir(), credential, acl, strings.Join(conf, "\n"))
	s.start()
	t.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.cmd = exec.Command("redis-server", "-")
	s.cmd.Stdin = strings.NewReader(s.conf)
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for began := time.Now(); s.ping() != nil; {
		if time.Since(began) > 10*time.Second {
			s.t.Fatalf("redis-server does not answer: %v", s.ping())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *server) ping() error {
	c, err := net.Dial("tcp", s.addr())
	if err == nil {
		c.Close()
	}
	return err
}

// kill ends the server as a crash would.
func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

func (s *server) addr() string { return "127.0.0.1:" + s.port }

// cli returns what the command, a sentence, is answered by redis-cli as admin.
func (s *server) cli(command string) string {
	s.t.Helper()
	args := append([]string{"-e", "-p", s.port, "--user", "admin", "--pass", "admin", "--no-auth-warning"}, strings.Fields(command)...)
	out, err := exec.Command("redis-cli", args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("redis-cli %s: %v: %s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

// until waits for what Redis takes some time for.
func (s *server) until(command, says string) {
	s.t.Helper()
	for began := time.Now(); !strings.Contains(s.cli(command), says); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			s.t.Fatalf("%s does not say %s: %s", command, says, s.cli(command))
		}
	}
}

// freePort returns a port that is free. It and the port of Redis Cluster's
// bus, 10,000 above it, are below those that the kernel gives to clients.
func freePort() string {
	for {
		port := 12_000 + rand.IntN(10_000)
		if isFree(port) && isFree(port+10_000) {
			return strconv.Itoa(port)
		}
	}
}

func isFree(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
	if err == nil {
		l.Close()
	}
	return err == nil
}

// A fleet is three instances that share a Redis, and the clients that load them.
type fleet struct {
	t         *testing.T
	redis     *server  // has the total
	url       string   // where the instances find it
	env       []string // further settings of theirs
	instances [3]*process

	mu      sync.Mutex
	answers [3][]answer
	failed  int // requests without an answer
}

// start starts instance i, where it has run before with the same host name and port.
func (f *fleet) start(i int) {
	addr := "127.0.0.1:" + freePort()
	if p := f.instances[i]; p != nil {
		addr = strings.TrimPrefix(p.url, "http://")
	}
	f.instances[i] = startProcess(f.t, slices.Concat(f.env, []string{"ADDR=" + addr, "REDIS_URL=" + f.url})...)
}

const clientsEach = 4 // of each instance

// load sends requests to all instances until stop is closed.
func (f *fleet) load(stop <-chan struct{}) {
	var wg sync.WaitGroup
	for i, p := range f.instances {
		for range clientsEach {
			wg.Go(func() {
				c := &http.Client{Transport: &http.Transport{}}
				defer c.CloseIdleConnections()
				for {
					select {
					case <-stop:
						return
					case <-time.After(2 * time.Millisecond):
					}
					a, err := ask(c, p.url)
					f.mu.Lock()
					if err != nil {
						f.failed++
					} else {
						f.answers[i] = append(f.answers[i], a)
					}
					f.mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
}

// split divides answers into the instance's numbers and the cluster's.
func split(answers []answer) (instance, cluster []int64) {
	for _, a := range answers {
		instance = append(instance, a.n)
		if a.status == http.StatusOK {
			cluster = append(cluster, a.total)
		}
	}
	return instance, cluster
}

// A scenario is something that happens to a fleet under load.
type scenario struct {
	name    string
	timeout string         // REDIS_TIMEOUT
	prepare func(f *fleet) // before the instances start; nil for one plain Redis
	fault   func(f *fleet) // while they are under load
	loses   bool           // Redis loses its memory: numbers may repeat
	fails   bool           // some requests must be answered with 503; else none may be
	kills   bool           // an instance is killed: some requests may be counted and not answered
	stops   bool           // instances are away for a while: some requests get no answer
}

// Whatever is done to real servers and instances under load, the total ends
// up as the number of requests answered.
func TestRealServers(t *testing.T) {
	for _, tt := range []scenario{
		{name: "Redis killed and restarted empty, ten times", timeout: "5s", loses: true, fault: func(f *fleet) {
			for range 10 {
				f.redis.kill()
				time.Sleep(100 * time.Millisecond)
				f.redis.start()
				time.Sleep(100 * time.Millisecond)
			}
		}},
		{name: "Redis killed and restarted empty after the timeout", timeout: "300ms", loses: true, fails: true, fault: func(f *fleet) {
			f.redis.kill()
			time.Sleep(time.Second)
			f.redis.start()
		}},
		{name: "Redis stopped for less than the timeout", timeout: "5s", fault: func(f *fleet) {
			f.redis.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(500 * time.Millisecond)
			f.redis.cmd.Process.Signal(syscall.SIGCONT)
		}},
		{name: "Redis stopped for more than the timeout", timeout: "300ms", fails: true, fault: func(f *fleet) {
			f.redis.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(time.Second)
			f.redis.cmd.Process.Signal(syscall.SIGCONT)
		}},
		{name: "FLUSHALL, ten times", timeout: "5s", loses: true, fault: func(f *fleet) {
			for range 10 {
				f.redis.cli("FLUSHALL")
				time.Sleep(20 * time.Millisecond)
			}
		}},
		failover("failover that waits for the replica", false, func(from, to *server) {
			from.cli("FAILOVER TO 127.0.0.1 " + to.port)
			from.until("INFO replication", "role:slave")
		}),
		failover("failover that loses the last writes", true, func(from, to *server) {
			to.cli("REPLICAOF NO ONE")
			time.Sleep(50 * time.Millisecond)
			from.cli("REPLICAOF 127.0.0.1 " + to.port)
		}),
		redisCluster(),
		{name: "TLS and a password, all connections cut ten times", timeout: "5s", prepare: func(f *fleet) {
			port, files := freePort(), certificate(f.t)
			f.redis = startServer(f.t, ">right", "tls-port "+port, "tls-cert-file "+files, "tls-key-file "+files, "tls-auth-clients no")
			f.url, f.env = "rediss://:right@127.0.0.1:"+port, []string{"SSL_CERT_FILE=" + files}
		}, fault: func(f *fleet) {
			for range 10 {
				f.redis.cli("CLIENT KILL USER default")
				time.Sleep(20 * time.Millisecond)
			}
		}},
		{name: "instance killed and restarted, same host and port", timeout: "5s", kills: true, stops: true, fault: func(f *fleet) {
			f.instances[0].Process.Kill()
			f.instances[0].wait()
			time.Sleep(100 * time.Millisecond)
			f.start(0)
		}},
		{name: "instances restarted one by one", timeout: "5s", stops: true, fault: func(f *fleet) {
			for i, p := range f.instances {
				p.Process.Signal(syscall.SIGTERM)
				if status, log := p.wait(); status != 0 {
					f.t.Errorf("status %d\n%s", status, log)
				}
				f.start(i)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			needServers(t)
			f := &fleet{t: t}
			if tt.prepare != nil {
				tt.prepare(f)
			} else {
				f.redis = startServer(t, "nopass")
				f.url = "redis://" + f.redis.addr()
			}
			f.env = append(f.env, "REDIS_TIMEOUT="+tt.timeout)
			for i := range f.instances {
				f.start(i)
			}
			stop := make(chan struct{})
			var loading sync.WaitGroup
			loading.Go(func() { f.load(stop) })
			time.Sleep(300 * time.Millisecond)
			tt.fault(f)
			time.Sleep(500 * time.Millisecond)
			close(stop)
			loading.Wait()

			instance, cluster := split(slices.Concat(f.answers[:]...))
			more := 0
			if tt.kills {
				more = clientsEach
			}
			total := f.total(len(instance), more)
			t.Logf("%s: %d requests answered, %d of them with 503; the total is %d; %d requests without an answer", tt.name, len(instance), len(instance)-len(cluster), total, f.failed)
			if unavailable := len(instance) - len(cluster); (unavailable > 0) != tt.fails {
				t.Errorf("%d requests were answered with 503", unavailable)
			}
			if f.failed > 0 && !tt.stops {
				t.Errorf("%d requests were not answered", f.failed)
			}
			if n := distinct(cluster); n != len(cluster) && !tt.loses {
				t.Errorf("the cluster's numbers: %d different ones in %d answers", n, len(cluster))
			}
			for i, answers := range f.answers {
				if numbers, _ := split(answers); !tt.stops {
					oneTo(t, fmt.Sprint("instance ", i), numbers)
				}
			}
		})
	}
}

// total returns the total. It fails the test unless that is, within 5 s, the
// time for a few heartbeats, the number of requests answered, or up to more of
// those that were given up beside them.
func (f *fleet) total(answered, more int) int {
	f.t.Helper()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		n, err := strconv.Atoi(f.redis.cli("GET requestcount"))
		if err == nil && n >= answered && n <= answered+more {
			return n
		}
		if time.Since(began) > 5*time.Second {
			f.t.Errorf("the total is %d, %v, after %d answers, and %d requests that were given up", n, err, answered, more)
			return n
		}
	}
}

// failover returns a scenario in which the role of the primary, and its
// address, go from one server to another.
func failover(name string, loses bool, promote func(from, to *server)) scenario {
	var heir *server
	var address *proxy
	return scenario{name: name, timeout: "5s", loses: loses, prepare: func(f *fleet) {
		f.redis = startServer(f.t, "nopass")
		heir = startServer(f.t, "nopass", "replicaof 127.0.0.1 "+f.redis.port)
		heir.until("INFO replication", "master_link_status:up")
		address = newProxy(f.t, "redis://"+f.redis.addr())
		f.url = "redis://" + address.Addr().String()
	}, fault: func(f *fleet) {
		promote(f.redis, heir)
		time.Sleep(100 * time.Millisecond) // in which the instances are told READONLY
		f.redis = heir
		address.redirect(heir.addr())
	}}
}

// redisCluster returns a scenario in which the instances are pointed at a node
// that does not own the keys, and these move to another node under load.
func redisCluster() scenario {
	var servers [3]*server // the owner, the next owner, and the one pointed at
	var ids [3]string
	return scenario{name: "Redis Cluster, the slot moved", timeout: "5s", prepare: func(f *fleet) {
		for i := range servers {
			servers[i] = startServer(f.t, "nopass", "cluster-enabled yes", "cluster-node-timeout 5000")
			ids[i] = servers[i].cli("CLUSTER MYID")
			servers[i].cli(fmt.Sprint("CLUSTER SET-CONFIG-EPOCH ", i+1))
			if i > 0 {
				servers[0].cli("CLUSTER MEET 127.0.0.1 " + servers[i].port)
			}
		}
		// The slot of the keys is 866; the first third of the slots belongs to the owner.
		for i, slots := range []string{"0 5460", "5461 10922", "10923 16383"} {
			servers[i].cli("CLUSTER ADDSLOTSRANGE " + slots)
		}
		for _, s := range servers {
			s.until("CLUSTER INFO", "cluster_state:ok")
			s.until("CLUSTER INFO", "cluster_known_nodes:3")
		}
		f.redis, f.url = servers[0], "redis://"+servers[2].addr()
	}, fault: func(f *fleet) {
		slot := f.redis.cli("CLUSTER KEYSLOT requestcount")
		servers[1].cli("CLUSTER SETSLOT " + slot + " IMPORTING " + ids[0])
		servers[0].cli("CLUSTER SETSLOT " + slot + " MIGRATING " + ids[1])
		for _, key := range []string{"requestcount", "{requestcount}:instances"} {
			servers[0].cli("MIGRATE 127.0.0.1 " + servers[1].port + " " + key + " 0 5000 AUTH2 admin admin")
			time.Sleep(100 * time.Millisecond) // in which the instances are told TRYAGAIN, then ASK
		}
		for _, s := range servers {
			s.cli("CLUSTER SETSLOT " + slot + " NODE " + ids[1])
		}
		f.redis = servers[1]
	}}
}

// certificate returns a file with a new certificate for 127.0.0.1, and its key.
func certificate(t *testing.T) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter:     time.Now().Add(time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "redis.pem")
	pair := slices.Concat(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	if err := os.WriteFile(file, pair, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// A Redis that does not let the instance in: it says why, without the
// password, answers 503, and counts.
func TestRefusedByRedis(t *testing.T) {
	needServers(t)
	port, file := freePort(), certificate(t)
	redis := startServer(t, ">right", "tls-port "+port, "tls-cert-file "+file, "tls-key-file "+file, "tls-auth-clients no")
	for _, tt := range []struct{ name, url, certificates, says string }{
		{"wrong password", "redis://:secret@" + redis.addr(), "", "WRONGPASS"},
		{"no password", "redis://" + redis.addr(), "", "NOAUTH"},
		{"a command that its ACL refuses", "redis://:right@" + redis.addr() + "/1", "", "NOPERM"},
		{"a certificate of nobody known", "rediss://:secret@127.0.0.1:" + port, "", "certificate signed by unknown authority"},
		{"a certificate for another name", "rediss://:secret@localhost:" + port, file, "certificate is not valid for any names, but wanted to match localhost"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "REDIS_URL="+tt.url, "SSL_CERT_FILE="+tt.certificates)
			for n := range int64(3) {
				if a, err := ask(http.DefaultClient, p.url); err != nil || a.status != 503 || a.n != n+1 {
					t.Errorf("%+v, %v", a, err)
				}
			}
			if resp, body := get(t, "GET", p.url+"/readyz"); resp.StatusCode != 503 || !strings.Contains(body, tt.says) {
				t.Errorf("ready: %s %q", resp.Status, body)
			}
			p.Process.Signal(syscall.SIGTERM)
			if status, log := p.wait(); status != 0 || !strings.Contains(log, tt.says) || strings.Contains(log, "secret") {
				t.Errorf("status %d\n%s", status, log)
			}
		})
	}
}

// A badClient does something to the server at addr, and returns how many of
// its requests were answered, and how many more may have been counted.
type badClient struct {
	name string
	run  func(t *testing.T, addr string) (answered, more int)
}

const plainGet = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

var badClients = []badClient{
	{"1,000 connections that send a byte a second", func(t *testing.T, addr string) (int, int) {
		eachOf(t, 1000, 1000, addr, func(c net.Conn) bool {
			for i := range plainGet {
				if _, err := c.Write([]byte{plainGet[i]}); err != nil {
					return true
				}
				time.Sleep(time.Second)
				if i > 7 {
					t.Error("a client that is slow to send its headers is not cut off")
					break
				}
			}
			return true
		})
		return 0, 0
	}},
	{"100,000 short connections", func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 100_000, 32, addr, func(c net.Conn) bool {
			return request(c, strings.Replace(plainGet, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{"headers of a megabyte", func(t *testing.T, addr string) (int, int) {
		eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			// The server may hang up before it has read all of it.
			status := request(c, "GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")
			return status == "HTTP/1.1 431 Request Header Fields Too Large" || status == ""
		})
		return 0, 0
	}},
	{"garbage", func(t *testing.T, addr string) (int, int) {
		eachOf(t, 1000, 10, addr, func(c net.Conn) bool {
			garbage := make([]byte, 1000)
			crand.Read(garbage)
			return request(c, string(garbage)+"\r\n\r\n") == "HTTP/1.1 400 Bad Request"
		})
		return 0, 0
	}},
	{"1,000 pipelined requests", func(t *testing.T, addr string) (int, int) {
		const each = 1000
		return each * eachOf(t, 10, 10, addr, func(c net.Conn) bool {
			go io.WriteString(c, strings.Repeat(plainGet, each))
			r := bufio.NewReader(c)
			for range each {
				resp, err := http.ReadResponse(r, nil)
				if err != nil || resp.StatusCode != http.StatusOK {
					return false
				}
				io.Copy(io.Discard, resp.Body)
			}
			return true
		}), 0
	}},
	{"a body on GET", func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			return request(c, "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 100_000)) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{"requests that are reset at once", func(t *testing.T, addr string) (int, int) {
		return 0, eachOf(t, 5000, 10, addr, func(c net.Conn) bool {
			io.WriteString(c, plainGet)
			return true
		})
	}},
}

// eachOf runs f on n connections, so many at a time, and returns for how many
// it was true, which fails the test unless it is all. Connections end by a
// reset, so that none is left in the kernel.
func eachOf(t *testing.T, n, atATime int, addr string, f func(c net.Conn) bool) int {
	var left, good atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				c.(*net.TCPConn).SetLinger(0)
				if f(c) {
					good.Add(1)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	if good.Load() != int64(n) {
		t.Errorf("%d of %d connections went as they should", good.Load(), n)
	}
	return int(good.Load())
}

// request sends text and returns the first line of the answer, or nothing.
func request(c net.Conn, text string) string {
	go io.WriteString(c, text)
	line, _ := bufio.NewReader(c).ReadString('\n')
	return strings.TrimRight(line, "\r\n")
}

// Whatever bad clients do, the good one beside them gets its answers, and the
// server lets go of what they took.
func TestManyBadClients(t *testing.T) {
	needServers(t)
	f := &fleet{t: t, redis: startServer(t, "nopass")}
	p := startProcess(t, "REDIS_URL=redis://"+f.redis.addr())
	addr := strings.TrimPrefix(p.url, "http://")
	answered, more := 0, 0
	askGood := func(when string) {
		if a, err := ask(http.DefaultClient, p.url); err != nil || a.status != http.StatusOK {
			t.Errorf("%s: the good client got %+v, %v", when, a, err)
		}
	}
	for _, bad := range badClients {
		stop, good := make(chan struct{}), make(chan []time.Duration)
		go func() {
			var took []time.Duration
			for {
				select {
				case <-stop:
					good <- took
					return
				case <-time.After(time.Millisecond):
				}
				began := time.Now()
				askGood(bad.name)
				took = append(took, time.Since(began))
			}
		}()
		a, m := bad.run(t, addr)
		close(stop)
		took := <-good
		slices.Sort(took)
		answered, more = answered+a+len(took), more+m
		left := p.connections(t, 3) // it listens, and is connected to Redis and to the good client
		t.Logf("%s: the good client's %d answers took %v in the middle and %v at the most; %d kB resident, %d kB at the most, %d connections left",
			bad.name, len(took), took[len(took)/2], took[len(took)-1], p.memory(t, "VmRSS"), p.memory(t, "VmHWM"), left)
		if left > 3 {
			t.Errorf("%s: %d connections left", bad.name, left)
		}
	}
	const enough = 48 << 10 // kB
	// Go collects garbage as requests come.
	for began := time.Now(); p.memory(t, "VmRSS") > enough && time.Since(began) < 30*time.Second; answered++ {
		askGood("after them")
	}
	f.total(answered, more)
	// The chart's limit is 128 MiB.
	if now, most := p.memory(t, "VmRSS"), p.memory(t, "VmHWM"); now > enough || most > 100<<10 {
		t.Errorf("%d kB resident, %d kB at the most", now, most)
	}
	p.Process.Signal(syscall.SIGQUIT) // to which Go answers with all goroutines
	_, log := p.wait()
	goroutines := strings.Count(log, "\ngoroutine ")
	t.Logf("%d goroutines left", goroutines)
	if goroutines == 0 || goroutines > 20 {
		t.Errorf("%d goroutines left", goroutines)
	}
	logged, _, _ := strings.Cut(log, "SIGQUIT")
	if n := strings.Count(logged, "\n"); n > 5 {
		t.Errorf("%d lines were logged:\n%.2000s", n, logged)
	}
}

// connections returns how many sockets the process has open, once they are no
// more than enough, or after 5 s.
func (p *process) connections(t *testing.T, enough int) int {
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, file := range files {
			if to, _ := os.Readlink(file); strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		if n <= enough || time.Since(began) > 5*time.Second {
			return n
		}
	}
}

// memory returns VmRSS, what is resident, or VmHWM, the most that was, in kB.
func (p *process) memory(t *testing.T, name string) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, value, _ := strings.Cut(string(status), name+":")
	kB, err := strconv.Atoi(strings.Fields(value)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kB
}
