package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// startRedis returns the URL of a Redis: a miniredis of the test's own, or the
// server at REDIS_URL, which all tests then share under keys of their own.
func startRedis(t *testing.T) string {
	if realRedis != "" {
		return realRedis
	}
	return "redis://" + miniredis.RunT(t).Addr()
}

func mustParse(t testing.TB, url string, timeout time.Duration) *redis {
	t.Helper()
	r, err := parseRedisURL(url)
	if err != nil {
		t.Fatal(err)
	}
	r.timeout = timeout
	return r
}

// newKey returns a key that no other test uses, deleted at the end.
func newKey(t *testing.T, url string) string {
	key := "test:" + rand.Text()
	t.Cleanup(func() { empty(t, url, key) })
	return key
}

func newConn(r *redis) *conn { return &conn{redis: r, addr: r.addr} }

// empty makes Redis forget what it knows of key, as a restart would.
func empty(t *testing.T, url, key string) {
	c := newConn(mustParse(t, url, 5*time.Second))
	defer c.drop()
	if _, err := c.ask(false, "DEL", key, "{"+key+"}:instances"); err != nil && !t.Failed() {
		t.Errorf("DEL: %v", err)
	}
}

// total returns the total at key.
func total(t *testing.T, url, key string) int64 {
	t.Helper()
	c := newConn(mustParse(t, url, 5*time.Second))
	defer c.drop()
	n, err := c.ask(false, "INCRBY", key, "0")
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// start runs c until the test ends.
func start(t *testing.T, c *counter) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// A proxy passes bytes between clients and Redis, and has faults to order.
type proxy struct {
	net.Listener

	mu     sync.Mutex
	moved  *sync.Cond
	fault  fault
	target string
	conns  map[net.Conn]bool
}

type fault int

const (
	none    fault = iota
	refuse        // connections are reset
	swallow       // commands pass, replies vanish
	vanish        // nothing passes in either direction
	hold          // nothing passes until the fault ends; then all does, though the client may be gone
)

func newProxy(t *testing.T, url string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, target: mustParse(t, url, 0).addr, conns: map[net.Conn]bool{}}
	p.moved = sync.NewCond(&p.mu)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(down) })
		}
	})
	t.Cleanup(func() { l.Close(); p.set(none); p.reset(); wg.Wait() })
	return p
}

func (p *proxy) set(f fault) {
	p.mu.Lock()
	p.fault = f
	p.mu.Unlock()
	p.moved.Broadcast()
	if f == refuse {
		p.reset()
	}
}

// reset resets every connection.
func (p *proxy) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

// redirect hands the address over to another server.
func (p *proxy) redirect(target string) {
	p.mu.Lock()
	p.target = target
	p.mu.Unlock()
	p.reset()
}

func (p *proxy) serve(down net.Conn) {
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	up, err := net.Dial("tcp", target)
	if err != nil {
		down.Close()
		return
	}
	p.mu.Lock()
	p.conns[down] = true
	refused := p.fault == refuse
	p.mu.Unlock()
	if refused {
		p.reset()
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(up, down, true) })
	wg.Go(func() { p.copy(down, up, false) })
	wg.Wait()
	p.mu.Lock()
	delete(p.conns, down)
	p.mu.Unlock()
}

func (p *proxy) copy(to, from net.Conn, command bool) {
	defer to.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		for p.fault == hold {
			p.moved.Wait()
		}
		f := p.fault
		p.mu.Unlock()
		if n > 0 && (f == none || f == swallow && command) {
			to.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// tally is what the clients of one counter were told.
type tally struct {
	mu       sync.Mutex
	instance []int64
	cluster  []int64 // of those answered with one
}

// load has 8 clients ask c until stop is closed.
func load(c *counter, stop <-chan struct{}) *tally {
	var t tally
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				n, total, err := c.next()
				t.mu.Lock()
				t.instance = append(t.instance, n)
				if err == nil {
					t.cluster = append(t.cluster, total)
				}
				t.mu.Unlock()
			}
		})
	}
	wg.Wait()
	return &t
}

// oneTo fails the test unless numbers holds 1 … k, each once.
func oneTo(t *testing.T, what string, numbers []int64) {
	t.Helper()
	slices.Sort(numbers)
	for i, n := range numbers {
		if n != int64(i+1) {
			t.Fatalf("%s's numbers are not 1 … %d: number %d in order is %d", what, len(numbers), i+1, n)
		}
	}
}

// distinct returns how many different numbers there are.
func distinct(numbers []int64) int {
	return len(slices.Compact(slices.Sorted(slices.Values(numbers))))
}

// Whatever happens to Redis and to the network, the total ends up as the
// number of requests answered, and each instance's numbers have no gap.
func TestFaults(t *testing.T) {
	const short, long = 100 * time.Millisecond, 5 * time.Second
	lasts := func(f fault, d time.Duration) func(*proxy, func()) {
		return func(p *proxy, _ func()) { p.set(f); time.Sleep(d); p.set(none) }
	}
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		fault   func(p *proxy, empty func())
		loses   bool // Redis loses its memory: numbers may repeat
		fails   bool // some requests must be answered without a number; else none may be
	}{
		{"reset in mid-flight", long, func(p *proxy, _ func()) {
			for range 20 {
				p.reset()
				time.Sleep(5 * time.Millisecond)
			}
		}, false, false},
		{"reply swallowed", 2 * time.Second, func(p *proxy, _ func()) {
			p.set(swallow)
			time.Sleep(50 * time.Millisecond)
			p.reset()
			p.set(none)
		}, false, false},
		{"delivered after the client gave up", short, lasts(hold, 3*short), false, true},
		{"refused for less than the timeout", long, lasts(refuse, 200*time.Millisecond), false, false},
		{"refused for more than the timeout", short, lasts(refuse, 3*short), false, true},
		{"black-holed for less than the timeout", 2 * time.Second, lasts(vanish, 500*time.Millisecond), false, false},
		{"black-holed for more than the timeout", short, lasts(vanish, 3*short), false, true},
		{"emptied", long, func(_ *proxy, empty func()) {
			for range 10 {
				empty()
				time.Sleep(10 * time.Millisecond)
			}
		}, true, false},
		{"gone and back empty, for less than the timeout", long, func(p *proxy, empty func()) {
			p.set(refuse)
			empty()
			time.Sleep(100 * time.Millisecond)
			p.set(none)
		}, true, false},
		{"gone and back empty, for more than the timeout", short, func(p *proxy, empty func()) {
			p.set(refuse)
			empty()
			time.Sleep(3 * short)
			p.set(none)
		}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url := startRedis(t)
			p := newProxy(t, url)
			key := newKey(t, url)
			r := mustParse(t, url, tt.timeout)
			r.addr = p.Addr().String()
			faulty := newCounter("faulty:1", key, r)
			steady := newCounter("steady:1", key, mustParse(t, url, long))
			start(t, faulty)
			start(t, steady)

			stop := make(chan struct{})
			var tallies [2]*tally
			var wg sync.WaitGroup
			for i, c := range []*counter{faulty, steady} {
				wg.Go(func() { tallies[i] = load(c, stop) })
			}
			time.Sleep(50 * time.Millisecond)
			tt.fault(p, func() { empty(t, url, key) })
			time.Sleep(150 * time.Millisecond)
			close(stop)
			wg.Wait()

			for _, c := range []*counter{faulty, steady} {
				for c.heartbeat(); !c.stats().up; c.heartbeat() {
				}
			}
			f, s := tallies[0], tallies[1]
			if got, want := total(t, url, key), int64(len(f.instance)+len(s.instance)); got != want {
				t.Errorf("total %d after %d requests", got, want)
			}
			oneTo(t, "the faulty instance", f.instance)
			oneTo(t, "the steady instance", s.instance)
			if failed := len(f.instance) - len(f.cluster); (failed > 0) != tt.fails {
				t.Errorf("%d of %d requests were answered without the cluster's number", failed, len(f.instance))
			}
			if len(s.cluster) != len(s.instance) {
				t.Errorf("the steady instance failed %d requests", len(s.instance)-len(s.cluster))
			}
			all := slices.Concat(f.cluster, s.cluster)
			if n := distinct(all); n != len(all) && !tt.loses {
				t.Errorf("%d numbers for %d answers", n, len(all))
			}
		})
	}
}

// A heartbeat that flies while requests wait takes none of their numbers.
func TestHeartbeatBetweenGatheringAndCut(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	c := newCounter("host:1", newKey(t, url), mustParse(t, url, 5*time.Second))
	conn := <-c.pool
	type numbers struct{ instance, cluster int64 }
	got := make(chan numbers, 2)
	for range 2 {
		go func() {
			n, total, _ := c.next()
			got <- numbers{n, total}
		}()
	}
	for gathered := int64(0); gathered < 2; {
		c.mu.Lock()
		gathered = c.gathering.size
		c.mu.Unlock()
	}
	c.fly(conn, newFlight())
	if s := c.stats(); s.instance != 0 || s.cluster != 0 || !s.up {
		t.Errorf("after the heartbeat: %+v", s)
	}
	c.pool <- conn
	a, b := <-got, <-got
	if a.instance+b.instance != 3 || a.cluster+b.cluster != 3 || a.instance == b.instance {
		t.Errorf("got %v and %v, want 1 and 2", a, b)
	}
}

// An instance without requests sees those of the others.
func TestHeartbeatSeesTheCluster(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	busy := newCounter("busy:1", key, mustParse(t, url, 5*time.Second))
	idle := newCounter("idle:1", key, mustParse(t, url, 5*time.Second))
	for range 3 {
		busy.next()
	}
	idle.heartbeat()
	if s := idle.stats(); s != (stats{0, 3, true}) {
		t.Errorf("the idle instance sees %+v", s)
	}
}

// What the script adds and answers, whatever Redis holds and in whatever order
// commands arrive. Each step goes on from the one before it.
func TestScript(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	ledger := "{" + key + "}:instances"
	conn := newConn(mustParse(t, url, 5*time.Second))
	t.Cleanup(conn.drop)
	flight := func(count, added, expected string) []string {
		return []string{"EVALSHA", scriptSHA, "2", key, ledger, "host:1/X", count, added, expected}
	}
	for _, step := range []struct {
		what          string
		cmd           []string
		answer, total int64
	}{
		{"a first heartbeat", flight("0", "0", "0 0"), 0, 0},
		{"a first flight", flight("5", "5", "0 0"), 5, 5},
		{"the same again", flight("5", "5", "0 0"), 5, 5},
		{"the next one", flight("7", "2", "5 5"), 7, 7},
		{"the first one, late", flight("5", "5", "0 0"), 7, 7},
		{"others", []string{"INCRBY", key, "10"}, 17, 17},
		{"the second one again", flight("7", "2", "5 5"), 7, 17},
		{"a heartbeat", flight("7", "0", "7 7"), 17, 17},
		{"others", []string{"INCRBY", key, "10"}, 27, 27},
		{"the heartbeat again", flight("7", "0", "7 7"), 17, 27},
		{"a flight that takes a failed one along", flight("10", "3", "7 17"), 30, 30},
		{"a flight that does not know of the last one", flight("11", "4", "7 17"), 31, 31},
		{"an older entry and total, as after a failover", []string{"HSET", ledger, "host:1/X", "6 26"}, 0, 31},
		{"a flight then", flight("12", "1", "11 31"), 37, 37},
		{"Redis forgets", []string{"DEL", key, ledger}, 2, 0},
		{"a heartbeat then", flight("12", "0", "12 37"), 12, 12},
		{"the ledger forgets this instance only", []string{"HDEL", ledger, "host:1/X"}, 1, 12},
		{"a process without requests starts", flight("0", "0", "0 0"), 12, 12},
	} {
		answer, err := conn.ask(false, step.cmd...)
		if total := total(t, url, key); answer != step.answer || total != step.total || err != nil {
			t.Errorf("%s: answer %d, total %d, %v; want %d and %d", step.what, answer, total, err, step.answer, step.total)
		}
	}
}

// Numbers beyond what Lua would write as 1e+08 or in 14 digits stay exact.
func TestLargeNumbers(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	for _, n := range []int64{99_999_999, 999_999_999_999_999, 1<<53 - 2} {
		c := newCounter("host:1", newKey(t, url), mustParse(t, url, 5*time.Second))
		c.n = n
		if i, total, err := c.next(); i != n+1 || total != n+1 || err != nil {
			t.Errorf("after %d: %d, %d, %v", n, i, total, err)
		}
	}
}

// The end of a run counts what is left and strikes the instance from the ledger.
func TestCleanExit(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	c := newCounter("host:1", key, mustParse(t, url, 5*time.Second))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { c.run(ctx); close(done) }()
	c.next()
	c.mu.Lock()
	c.n++ // a request that was answered 503 and not yet counted
	c.mu.Unlock()
	cancel()
	<-done
	if n := total(t, url, key); n != 2 {
		t.Errorf("total %d, want 2", n)
	}
	conn := newConn(mustParse(t, url, 5*time.Second))
	defer conn.drop()
	if n, err := conn.ask(false, "HLEN", c.ledger); n != 0 || err != nil {
		t.Errorf("the ledger has %d entries, %v", n, err)
	}
}

// answerRESP answers each command on nc as answer says, until nc is closed.
func answerRESP(nc net.Conn, answer func(cmd []string) string) {
	defer nc.Close()
	r := bufio.NewReader(nc)
	line := func() string { s, _ := r.ReadString('\n'); return strings.TrimRight(s, "\r\n") }
	for {
		n, err := strconv.Atoi(strings.TrimPrefix(line(), "*"))
		if err != nil {
			return
		}
		cmd := make([]string, n)
		for i := range cmd {
			size, _ := strconv.Atoi(strings.TrimPrefix(line(), "$"))
			arg := make([]byte, size+2)
			if _, err := io.ReadFull(r, arg); err != nil {
				return
			}
			cmd[i] = string(arg[:size])
		}
		if _, err := io.WriteString(nc, answer(cmd)); err != nil {
			return
		}
	}
}

// fakeRedis returns a Redis for a synctest bubble: it shakes hands, and evalsha
// answers the rest.
func fakeRedis(timeout time.Duration, evalsha func() string) *redis {
	return &redis{addr: "fake:6379", timeout: timeout, dial: func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go answerRESP(server, func(cmd []string) string {
			if cmd[0] == "SCRIPT" {
				return "$40\r\n" + scriptSHA + "\r\n"
			}
			return evalsha()
		})
		return client, nil
	}}
}

// Error replies that pass are asked again within the timeout, others are not.
func TestErrorReplies(t *testing.T) {
	for _, tt := range []struct {
		reply   string
		retried bool
	}{
		{"-READONLY You can't write against a read only replica.", true},
		{"-LOADING Redis is loading the dataset in memory", true},
		{"-MASTERDOWN Link with MASTER is down", true},
		{"-CLUSTERDOWN The cluster is down", true},
		{"-TRYAGAIN Multiple keys request during rehashing of slot", true},
		{"-NOSCRIPT No matching script.", true},
		{"-ASK 866 10.0.0.2:6379", true},
		{"-MOVED 866 10.0.0.2:6379", true},
		{"-MOVED 866 :6380", true},
		{"-MOVED 866 nonsense", false},
		{"-WRONGTYPE Operation against a key holding the wrong kind of value", false},
		{"-NOPERM this user has no permissions", false},
		{"-", false},
		{"+OK", true},
		{"$-1", true},
		{":12a", true},
		{":" + strings.Repeat("1", maxLine), true},
	} {
		t.Run(tt.reply[:min(len(tt.reply), 20)], func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked atomic.Int64
				c := newConn(fakeRedis(time.Second, func() string {
					if asked.Add(1) == 1 {
						return tt.reply + "\r\n"
					}
					return ":7\r\n"
				}))
				n, err := c.ask(false, "EVALSHA")
				c.drop()
				if retried := err == nil && n == 7 && asked.Load() == 2; retried != tt.retried {
					t.Errorf("asked %d times: %d, %v", asked.Load(), n, err)
				}
			})
		})
	}
}

// A flight ends with the timeout, whether Redis refuses or is silent.
func TestTimeout(t *testing.T) {
	for _, tt := range []struct {
		name string
		dial func(ctx context.Context, _, _ string) (net.Conn, error)
	}{
		{"refused", func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("refused") }},
		{"no answer to SYN", func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }},
		{"no answer to a command", func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go io.Copy(io.Discard, server)
			return client, nil
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCounter("host:1", "k", &redis{addr: "fake:6379", timeout: time.Second, dial: tt.dial})
				began := time.Now()
				_, _, err := c.next()
				if took := time.Since(began); err == nil || took < 900*time.Millisecond || took > time.Second {
					t.Errorf("ended after %v: %v", took, err)
				}
				began = time.Now()
				n, _, err := c.next()
				if took := time.Since(began); err == nil || took != 0 || n != 2 {
					t.Errorf("while down, request %d was answered after %v: %v", n, took, err)
				}
			})
		})
	}
}

// The requests that wait behind a failing flight fail with it.
func TestFailureTakesTheWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("refused") }
		c := newCounter("host:1", "k", &redis{addr: "fake:6379", timeout: time.Second, dial: refused})
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 100 * time.Millisecond)
				if i == 1 {
					c.heartbeat() // waits for the connection ahead of the last request
				} else if _, _, err := c.next(); err == nil || time.Since(began) > time.Second {
					t.Errorf("request %d ended after %v: %v", i, time.Since(began), err)
				}
			})
		}
		wg.Wait()
		if n := c.stats().instance; n != 2 {
			t.Errorf("%d requests counted, want 2", n)
		}
	})
}

// A heartbeat flies each second while Redis answers, each 100 ms while it is down.
func TestHeartbeatPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var beats atomic.Int64
		c := newCounter("host:1", "k", fakeRedis(time.Second, func() string { beats.Add(1); return ":0\r\n" }))
		ctx, cancel := context.WithCancel(t.Context())
		go c.run(ctx)
		time.Sleep(10500 * time.Millisecond)
		if n := beats.Load(); n != 11 {
			t.Errorf("%d heartbeats in 10.5 s", n)
		}
		if err := c.ready(); err != nil {
			t.Error(err)
		}
		cancel()
		synctest.Wait()
	})
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int64
		r := &redis{addr: "fake:6379", timeout: time.Second, dial: func(context.Context, string, string) (net.Conn, error) {
			dials.Add(1)
			return nil, errors.New("refused")
		}}
		c := newCounter("host:1", "k", r)
		ctx, cancel := context.WithCancel(t.Context())
		go c.run(ctx)
		if err := c.ready(); err == nil {
			t.Error("ready before Redis has answered")
		}
		time.Sleep(2 * time.Second)
		dials.Store(0)
		time.Sleep(10 * time.Second)
		if n := dials.Load(); n < 95 || n > 105 {
			t.Errorf("%d attempts in 10 s", n)
		}
		if err := c.ready(); err == nil || err.Error() != "refused" {
			t.Errorf("ready says %v", err)
		}
		cancel()
		time.Sleep(5 * time.Second)
	})
}

// MOVED is followed, and forgotten once the node that it named is gone.
func TestMoved(t *testing.T) {
	t.Parallel()
	owner := miniredis.RunT(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var target atomic.Value
	target.Store(owner.Addr())
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go answerRESP(nc, func(cmd []string) string {
				if cmd[0] == "SCRIPT" {
					return "$40\r\n" + scriptSHA + "\r\n"
				}
				return fmt.Sprintf("-MOVED 866 %s\r\n", target.Load())
			})
		}
	}()
	c := newCounter("host:1", "k", mustParse(t, "redis://"+l.Addr().String(), 5*time.Second))
	if n, total, err := c.next(); n != 1 || total != 1 || err != nil {
		t.Errorf("first: %d, %d, %v", n, total, err)
	}
	heir := miniredis.RunT(t)
	target.Store(heir.Addr())
	owner.Close()
	if n, total, err := c.next(); n != 2 || total != 2 || err != nil {
		t.Errorf("after the move: %d, %d, %v", n, total, err)
	}
}

func TestAuthAndSelect(t *testing.T) {
	t.Parallel()
	m := miniredis.RunT(t)
	m.RequireUserAuth("ann", "a b@c/d")
	m.RequireAuth("default")
	for _, tt := range []struct{ url, want string }{
		{"redis://ann:a%20b%40c%2Fd@" + m.Addr() + "/3", ""},
		{"redis://:default@" + m.Addr() + "/3", ""},
		{"redis://ann:secret@" + m.Addr(), "WRONGPASS"},
		{"redis://" + m.Addr(), "NOAUTH"},
	} {
		_, _, err := newCounter("host:1", "k", mustParse(t, tt.url, 5*time.Second)).next()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %s", tt.url, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the password is in %q", err)
		}
	}
	if got, err := m.DB(3).Get("k"); got != "2" || err != nil {
		t.Errorf("database 3 has %q, %v", got, err)
	}
}

// A server that does not know AUTH quotes its arguments; the error does not.
func TestErrorHidesPassword(t *testing.T) {
	t.Parallel()
	client, server := net.Pipe()
	go answerRESP(server, func(cmd []string) string {
		return "-ERR unknown command 'AUTH', with args beginning with: 'secret'\r\n"
	})
	r := mustParse(t, "redis://:secret@host", time.Second)
	r.dial = func(context.Context, string, string) (net.Conn, error) { return client, nil }
	c := newConn(r)
	_, err := c.ask(false, "PING")
	if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "unknown command") {
		t.Errorf("got %v", err)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	web := httptest.NewTLSServer(nil) // for its certificate, which is good for 127.0.0.1
	defer web.Close()
	m, err := miniredis.RunTLS(&tls.Config{Certificates: web.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r := mustParse(t, "rediss://"+m.Addr(), 10*time.Second)
	c := newCounter("host:1", "k", r)
	var unknown x509.UnknownAuthorityError
	if _, _, err := c.next(); !errors.As(err, &unknown) {
		t.Errorf("a certificate that the system does not trust: %v", err)
	}
	r.tls.RootCAs = x509.NewCertPool()
	r.tls.RootCAs.AddCert(web.Certificate())
	c = newCounter("host:1", "k", r)
	for want := range int64(3) {
		if n, total, err := c.next(); n != want+1 || total != want+1 || err != nil {
			t.Errorf("over TLS: %d, %d, %v", n, total, err)
		}
	}
}

func TestParseRedisURL(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		url, addr string
		auth      []string
		db        int
		tls       string
	}{
		{"redis://host", "host:6379", nil, 0, ""},
		{"redis://host/", "host:6379", nil, 0, ""},
		{"redis://host:1234/15", "host:1234", nil, 15, ""},
		{"redis://[::1]:1234", "[::1]:1234", nil, 0, ""},
		{"redis://[::1]", "[::1]:6379", nil, 0, ""},
		{"redis://:p%40ss@host", "host:6379", []string{"p@ss"}, 0, ""},
		{"redis://ann:p%3a%2f@host", "host:6379", []string{"ann", "p:/"}, 0, ""},
		{"rediss://host", "host:6379", nil, 0, "host"},
	} {
		r, err := parseRedisURL(tt.url)
		if err != nil {
			t.Errorf("%s: %v", tt.url, err)
			continue
		}
		name := ""
		if r.tls != nil {
			name = r.tls.ServerName
		}
		if r.addr != tt.addr || !slices.Equal(r.auth, tt.auth) || r.db != tt.db || name != tt.tls {
			t.Errorf("%s: addr %s, auth %q, db %d, tls %q", tt.url, r.addr, r.auth, r.db, name)
		}
	}
}

func TestAppendCommand(t *testing.T) {
	t.Parallel()
	got := appendCommand([]byte("x"), "SET", "", "a\r\nb")
	if want := "x*3\r\n$3\r\nSET\r\n$0\r\n\r\n$4\r\na\r\nb\r\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReadInt(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		reply string
		want  int64
		err   string // part of the error; empty for none
	}{
		{":0\r\n", 0, ""},
		{":-3\r\n", -3, ""},
		{":9223372036854775807\r\n", 1<<63 - 1, ""},
		{":9223372036854775808\r\n", 0, "in place of an integer"},
		{":\r\n", 0, "in place of an integer"},
		{"\r\n", 0, "in place of an integer"},
		{":1 \r\n", 0, "in place of an integer"},
		{"+OK\r\n", 0, "in place of an integer"},
		{"$1\r\n1\r\n", 0, "in place of an integer"},
		{"*1\r\n:1\r\n", 0, "in place of an integer"},
		{":1\n", 0, "without a carriage return"},
		{":1", 0, "EOF"},
		{"", 0, "EOF"},
		{"-ERR no\r\n", 0, "ERR no"},
		{strings.Repeat("x", 1<<20), 0, "more than 4096 bytes"},
	} {
		n, err := readInt(bufio.NewReaderSize(strings.NewReader(tt.reply), maxLine))
		if n != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%.20q: %d, %v; want %d, %q", tt.reply, n, err, tt.want, tt.err)
		}
	}
}

// A countedConn counts what is sent over it.
type countedConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countedConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// inParallel calls f, which one of n goroutines makes for itself, b.N times in all.
func inParallel(b *testing.B, n int, newF func() func()) {
	var left atomic.Int64
	left.Store(int64(b.N))
	fs := make([]func(), n)
	for i := range fs {
		fs[i] = newF()
	}
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				f()
			}
		})
	}
	wg.Wait()
}

// Requests that share flights to a real Redis, by how many wait at a time.
func BenchmarkFlight(b *testing.B) {
	needPrograms(b, "redis-server")
	r := mustParse(b, "redis://"+startServer(b, "nopass").addr(), 5*time.Second)
	var flights atomic.Int64
	dial := r.dial
	r.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		nc, err := dial(ctx, network, addr)
		return countedConn{nc, &flights}, err
	}
	for _, waiting := range []int{1, 16, 256} {
		b.Run(strconv.Itoa(waiting), func(b *testing.B) {
			c := newCounter("host:1", "requestcount", r)
			c.heartbeat()
			flights.Store(0)
			inParallel(b, waiting, func() func() {
				return func() {
					if _, _, err := c.next(); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/float64(flights.Load()), "requests/flight")
		})
	}
}

// Whatever a peer sends, the reader returns an error or the integer that it sent.
func FuzzReadInt(f *testing.F) {
	for _, seed := range []string{":1\r\n", "-ERR\r\n", "$40\r\n", ":-0\r\n", "\n", ":1\n", strings.Repeat("9", maxLine+1)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, reply []byte) {
		n, err := readInt(bufio.NewReaderSize(bytes.NewReader(reply), maxLine))
		line, _, ended := bytes.Cut(reply, []byte("\r\n"))
		if err == nil {
			sent, bad := strconv.ParseInt(string(bytes.TrimPrefix(line, []byte(":"))), 10, 64)
			if !ended || bad != nil || sent != n || reply[0] != ':' {
				t.Errorf("%q read as %d", reply, n)
			}
		}
		expect(bufio.NewReaderSize(bytes.NewReader(reply), maxLine), "$40", scriptSHA)
	})
}
