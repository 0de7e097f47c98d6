package main

import (
	"bufio"
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// realRedis is the server at REDIS_URL, if the tests are to use one.
var realRedis = os.Getenv("REDIS_URL")

// TestMain runs the tests or, in a process that command started, the program.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // nohup(1) would have programs ignore it
	os.Unsetenv("REDIS_URL")
	slog.SetDefault(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}

func mustParse(t *testing.T, url string, timeout time.Duration) *redisServer {
	t.Helper()
	s, err := parseRedisURL(url, timeout)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A network is the way to a Redis, with faults.
type network struct {
	url string                    // of that Redis
	key string                    // that no other test uses
	do  func(cmd []string) string // has Redis carry a command out and returns the reply as it is

	mu    sync.Mutex
	fault string // what comes of each command and dial: a reply, or one of those below
}

// What may come of a command, beside silent and closed.
const (
	carried = "carried" // Redis carries it out
	lost    = "lost"    // Redis carries it out, and then the connection is closed
	unread  = "unread"  // Redis carries it out, but is silent where the ledger is read
)

// newNetwork returns the way to a miniredis of the test's own, or to the server at REDIS_URL. It
// is called outside of bubbles.
func newNetwork(t *testing.T) *network {
	n := &network{url: realRedis, key: "test:" + crand.Text(), fault: carried}
	if n.url == "" {
		n.url = "redis://" + miniredis.RunT(t).Addr()
	}
	var reply bytes.Buffer
	c := &conn{server: mustParse(t, n.url, 5*time.Second), deadline: time.Now().Add(5 * time.Second)}
	c.addr = c.server.addr
	if err := c.dial(); err != nil {
		t.Fatal(err)
	}
	c.r = bufio.NewReader(io.TeeReader(c.nc, &reply))
	n.do = func(cmd []string) string {
		n.mu.Lock()
		defer n.mu.Unlock()
		reply.Reset()
		c.nc.Write(encode(cmd...))
		if kind, err := c.r.Peek(1); err == nil {
			readReply(c.r, kind[0])
		}
		return reply.String()
	}
	t.Cleanup(func() {
		n.forget()
		c.close()
	})
	return n
}

// server returns how to reach it.
func (n *network) server(t *testing.T) *redisServer {
	return fakeRedis(n.answer).server(t, "redis://fake")
}

func (n *network) answer(cmd []string) string {
	n.mu.Lock()
	fault := n.fault
	n.mu.Unlock()
	switch {
	case fault != carried && fault != lost && fault != unread:
		return fault
	case cmd[0] == "DIAL" || cmd[0] == "AUTH":
		return "+OK\r\n"
	case fault == unread && cmd[0] == "HGETALL":
		return silent
	}
	answer := n.do(cmd)
	if fault == lost {
		return closed
	}
	return answer
}

func (n *network) set(fault string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fault = fault
}

// forget makes Redis forget what it knows, as a restart would.
func (n *network) forget() { n.do([]string{"DEL", n.key}) }

// copy returns what Redis has, as goBack takes it.
func (n *network) copy() []string {
	got, _ := readReply(replyReader(n.do([]string{"HGETALL", n.key})), '*')
	return got.list
}

// goBack makes Redis go back to an older copy, as a failover would.
func (n *network) goBack(copied []string) {
	n.forget()
	n.do(append([]string{"HSET", n.key}, copied...))
}

// ledger returns what Redis has, and the sum of the counts in it.
func (n *network) ledger(t *testing.T) (l ledger, sum int64) {
	t.Helper()
	c := &conn{server: fakeRedis(n.do).server(t, "redis://fake"), key: n.key}
	defer func() { c.close() }()
	l, err := c.read()
	if err != nil {
		t.Error(err)
	}
	for _, e := range l.entries {
		sum += e.count
	}
	return l, sum
}

// total fails the test unless Redis has that total, and it is the sum of the counts.
func (n *network) total(t *testing.T, want int64) {
	t.Helper()
	if l, sum := n.ledger(t); l.total != want || sum != want {
		t.Errorf("got the total %d, and %d in the entries; want %d", l.total, sum, want)
	}
}

// start runs c until the end of the test, or until it is stopped.
func start(t *testing.T, c *counter) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.keep(ctx) })
	stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(func() {
		stop()
		closeAll(c)
	})
	return stop
}

// closeAll closes the TCP connections of counters, none of which may be in use.
func closeAll(counters ...*counter) {
	for _, c := range counters {
		c.lookConn.close()
		for range len(c.pool) {
			cn := <-c.pool
			cn.close()
			c.pool <- cn
		}
	}
}

// newInstance returns an instance in this process, and its handler.
func newInstance(t *testing.T, instance, key string, redis *redisServer) (*httptest.Server, *handler) {
	h := &handler{counter: newCounter(instance, key, redis), instance: instance}
	start(t, h.counter)
	s := httptest.NewServer(h.routes())
	t.Cleanup(s.Close)
	return s, h
}

// command returns the program as a process of its own with the settings in env only.
func command(t *testing.T, env []string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append([]string{"TEST_MAIN=1"}, env...)
	return cmd
}

// A process is a running server.
type process struct {
	*exec.Cmd
	addr, url string
	log       strings.Builder // complete after wait
	eof       chan struct{}
}

var startLine = regexp.MustCompile(`msg=start addr=(\S+) `)

// startProcess starts a server on a free port and waits until it listens.
func startProcess(t *testing.T, env ...string) *process {
	t.Helper()
	p := &process{Cmd: command(t, append([]string{"ADDR=127.0.0.1:0"}, env...)), eof: make(chan struct{})}
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })
	addr := make(chan string, 1)
	go func() {
		defer close(p.eof)
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			fmt.Fprintln(&p.log, lines.Text())
			if m := startLine.FindStringSubmatch(lines.Text()); m != nil {
				addr <- m[1]
			}
		}
	}()
	select {
	case p.addr = <-addr:
		p.url = "http://" + p.addr
	case <-p.eof:
		t.Fatalf("the server did not start: %s", &p.log)
	}
	return p
}

// wait returns the exit status and what was logged.
func (p *process) wait() (int, string) {
	<-p.eof
	p.Wait()
	return p.ProcessState.ExitCode(), p.log.String()
}

// awaitReady waits until the server is ready.
func (p *process) awaitReady(t *testing.T) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		resp, body, err := get("GET", p.url+"/readyz")
		if err == nil && resp.StatusCode == http.StatusOK {
			return
		}
		if time.Since(began) > 20*time.Second {
			t.Fatalf("not ready after 20 s: %q, %v", body, err)
		}
	}
}

func get(method, url string) (*http.Response, string, error) {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		return nil, "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// oneTo fails the test unless numbers holds 1 … k, each once.
func oneTo(t *testing.T, numbers []int64) {
	t.Helper()
	slices.Sort(numbers)
	for i, n := range numbers {
		if n != int64(i+1) {
			t.Fatalf("the numbers are not 1 … %d: number %d in order is %d", len(numbers), i+1, n)
		}
	}
}

func TestTwoInstancesOneRedis(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	one, _ := newInstance(t, "host1:8083", n.key, mustParse(t, n.url, 5*time.Second))
	two, _ := newInstance(t, "host2:8083", n.key, mustParse(t, n.url, 5*time.Second))
	for _, step := range []struct{ url, want string }{
		{two.URL, "You are talking to instance host2:8083.\nThis is request 1 to this instance and request 1 to the cluster.\n"},
		{one.URL, "You are talking to instance host1:8083.\nThis is request 1 to this instance and request 2 to the cluster.\n"},
		{two.URL, "You are talking to instance host2:8083.\nThis is request 2 to this instance and request 3 to the cluster.\n"},
	} {
		if _, body, err := get("GET", step.url); body != step.want {
			t.Errorf("got %q, %v; want %q", body, err, step.want)
		}
	}
}

// Every row of the README's table of paths.
func TestPaths(t *testing.T) {
	t.Parallel()
	const first, plain = "You are talking to instance host:1.\n", "text/plain; charset=utf-8"
	const alone, cutOff, stopping = "alone", "cut off from Redis", "stopping"
	for _, tt := range []struct {
		request, state string
		status         int
		header         map[string]string
		body           string // with a trailing … it is only the beginning
		counted        int64
	}{
		{"GET /", alone, 200, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "101"},
			first + "This is request 1 to this instance and request 1 to the cluster.\n", 1},
		{"GET /?a=b", alone, 200, nil, first + "…", 1},
		{"HEAD /", alone, 200, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "101"}, "", 1},
		{"GET /", cutOff, 503, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "106", "Retry-After": "1"},
			first + "This is request 1 to this instance; the cluster count is unavailable.\n", 1},
		{"GET /", stopping, 200, map[string]string{"Connection": "close"}, first + "…", 1},
		{"POST /", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"POST /healthz", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"GET /favicon.ico", alone, 404, nil, "…", 0},
		{"GET /healthz", cutOff, 200, nil, "ok\n", 0},
		{"GET /readyz", alone, 200, nil, "ready\n", 0},
		{"GET /readyz", cutOff, 503, nil, "not ready: …", 0},
		{"GET /readyz", stopping, 503, nil, "not ready: stopping\n", 0},
		{"GET /metrics", alone, 200, map[string]string{"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, "# HELP requestcount_instance_requests_total …", 0},
	} {
		t.Run(tt.request+" "+tt.state, func(t *testing.T) {
			t.Parallel()
			var redis *redisServer
			if tt.state == cutOff {
				redis = fakeRedis(func([]string) string { return closed }).server(t, "redis://fake")
				redis.timeout = 10 * time.Millisecond
			}
			s, h := newInstance(t, "host:1", "k", redis)
			h.stopping.Store(tt.state == stopping)
			method, path, _ := strings.Cut(tt.request, " ")
			resp, body, err := get(method, s.URL+path)
			if err != nil {
				t.Fatal(err)
			}
			want, begins := strings.CutSuffix(tt.body, "…")
			if resp.StatusCode != tt.status || !begins && body != want || !strings.HasPrefix(body, want) {
				t.Errorf("got %s %q, want %d %q", resp.Status, body, tt.status, tt.body)
			}
			for name, want := range tt.header {
				got := resp.Header.Get(name)
				if name == "Connection" && resp.Close { // net/http takes this header out
					got = "close"
				}
				if got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
			if n := h.counter.current().n; n != tt.counted {
				t.Errorf("%d requests counted, want %d", n, tt.counted)
			}
		})
	}
}

// An instance that has been ready stays so while Redis is down. Its metrics leave out what it
// does not know.
func TestRedisLostLater(t *testing.T) {
	n := newNetwork(t)
	metric := regexp.MustCompile(`(?m)^# HELP requestcount_(\S+) .*\n# TYPE requestcount_(\S+) .*\nrequestcount_(\S+) (\d+)$`)
	synctest.Test(t, func(t *testing.T) {
		h := &handler{counter: newCounter("host:1", n.key, n.server(t)), instance: "host:1"}
		start(t, h.counter)
		get := func(path string) (int, string) {
			w := httptest.NewRecorder()
			h.routes().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
			return w.Code, w.Body.String()
		}
		for _, step := range []struct {
			name, fault   string
			pause         time.Duration
			status, ready int
			metrics       string
		}{
			{"before Redis", closed, 3 * time.Second, 503, 503, "instance_requests_total 1, redis_up 0, "},
			{"Redis", carried, 3 * time.Second, 200, 200, "instance_requests_total 2, cluster_requests 2, redis_up 1, "},
			{"Redis gone", closed, 3 * time.Second, 503, 200, "instance_requests_total 3, cluster_requests 2, redis_up 0, "},
			{"Redis back, and empty", carried, time.Second, 503, 200, "instance_requests_total 4, cluster_requests 4, redis_up 1, "},
		} {
			if strings.Contains(step.name, "empty") {
				n.forget()
			}
			n.set(step.fault)
			time.Sleep(step.pause)
			status, _ := get("/")
			time.Sleep(2 * time.Second)
			ready, _ := get("/readyz")
			if status != step.status || ready != step.ready {
				t.Errorf("%s: got %d and %d, want %d and %d", step.name, status, ready, step.status, step.ready)
			}
			_, page := get("/metrics")
			got := ""
			for _, m := range metric.FindAllStringSubmatch(page, -1) {
				if m[1] == m[2] && m[2] == m[3] {
					got += m[3] + " " + m[4] + ", "
				}
			}
			if got != step.metrics {
				t.Errorf("%s: got the metrics %s, want %s of\n%s", step.name, got, step.metrics, page)
			}
		}
	})
}

func setenv(t *testing.T, setting string) {
	for _, name := range []string{"ADDR", "REDIS_URL", "REDIS_KEY", "REDIS_TIMEOUT", "SHUTDOWN_DELAY"} {
		t.Setenv(name, "")
	}
	if name, value, ok := strings.Cut(setting, "="); ok {
		t.Setenv(name, value)
	}
}

// A wrong setting is told by its name and what would be right, without a secret.
func TestWrongSettings(t *testing.T) {
	for _, tt := range []struct{ setting, want string }{
		{"ADDR=8083", `ADDR: malformed "8083": want host:port or :port, such as :8083`},
		{"ADDR=:65536", `ADDR: unknown port "65536": want 0 to 65535`},
		{"ADDR=:http-or-so", `ADDR: unknown port "http-or-so": want 0 to 65535`},
		{`ADDR=":8083"`, "ADDR: quotes around the value: want none; docker run --env-file"},
		{`REDIS_KEY="`, "REDIS_KEY: quotes around the value"},
		{`REDIS_URL="redis://:secret@host"`, "REDIS_URL: quotes around the value"},
		{"REDIS_TIMEOUT=1", `REDIS_TIMEOUT: "1": want a number with a unit, such as 500ms or 5s, and at least 20ms`},
		{"REDIS_TIMEOUT=19ms", `REDIS_TIMEOUT: "19ms": want a number with a unit, such as 500ms or 5s, and at least 20ms`},
		{"SHUTDOWN_DELAY=soon", `SHUTDOWN_DELAY: "soon": want a number with a unit, such as 500ms or 5s, and at least 0s`},
		{"SHUTDOWN_DELAY=-1s", `SHUTDOWN_DELAY: "-1s": want a number with a unit, such as 500ms or 5s, and at least 0s`},
		{"REDIS_URL=localhost:6379", "REDIS_URL: malformed URL: want redis://"},
		{"REDIS_URL=http://localhost", `REDIS_URL: unknown scheme "http": want redis or rediss`},
		{"REDIS_URL=ann:secret://localhost", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://", "REDIS_URL: missing host"},
		{"REDIS_URL=redis://host:0", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://ann:65536", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://host:", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://::1", "REDIS_URL: invalid port: want 1 to 65535, and an IPv6 address in brackets"},
		{"REDIS_URL=redis://host/x", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://host/-1", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://ann@host", "REDIS_URL: user without a password"},
		{"REDIS_URL=redis://ann:1/secret@host", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://ann:secret@host:port", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://:%zzsecret@host", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://:12#secret@host", "REDIS_URL: query or fragment"},
		{"REDIS_URL=redis://host?password=secret", "REDIS_URL: query or fragment"},
		{"REDIS_URL=secret:a@host", "REDIS_URL: malformed URL"},
	} {
		setenv(t, tt.setting)
		_, err := loadConfig()
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) ||
			strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %s", tt.setting, err, tt.want)
		}
	}
}

// Each setting has the default that the usage states, and white space around it does not count.
func TestSettings(t *testing.T) {
	setenv(t, "")
	want := config{addr: ":8083", key: "requestcount", redisTimeout: time.Second}
	if cfg, err := loadConfig(); err != nil || cfg != want {
		t.Errorf("got %+v, %v; want %+v", cfg, err, want)
	}
	for name, value := range map[string]string{"ADDR": " :1\n", "REDIS_URL": "redis://host\n", "REDIS_KEY": "{'k'}\r", "REDIS_TIMEOUT": "2s\t", "SHUTDOWN_DELAY": " 3s "} {
		t.Setenv(name, value)
	}
	cfg, err := loadConfig()
	if err != nil || cfg.redis.addr != "host:6379" || cfg.redis.timeout != 2*time.Second {
		t.Fatalf("got %+v, %v", cfg.redis, err)
	}
	cfg.redis = nil
	if want = (config{addr: ":1", key: "{'k'}", redisTimeout: 2 * time.Second, shutdownDelay: 3 * time.Second}); cfg != want {
		t.Errorf("got %+v, want %+v", cfg, want)
	}
}

// What a command that ends by itself says, and its status. A failure is one line.
func TestCommands(t *testing.T) {
	t.Parallel()
	ready, notReady := startProcess(t), startProcess(t, "REDIS_URL=redis://127.0.0.1:1")
	for _, tt := range []struct {
		env, args string
		status    int
		says      string // at its beginning
	}{
		{"", "-h", 0, usage},
		{"", "-version", 0, "dev\n"},
		{"", "healthcheck now", 2, `requestcount: unknown arguments "healthcheck now"`},
		{"REDIS_KEY='a'", "", 2, "requestcount: REDIS_KEY: quotes around the value"},
		{"ADDR=" + ready.addr, "", 1, "requestcount: listen tcp " + ready.addr + ": bind: address already in use"},
		{"ADDR=" + ready.addr, "healthcheck", 0, ""},
		{"ADDR=" + notReady.addr, "healthcheck", 1, "requestcount: not ready: "},
		{"ADDR=127.0.0.1:1", "healthcheck", 1, "requestcount: dial tcp 127.0.0.1:1: "},
	} {
		cmd := command(t, []string{tt.env}, strings.Fields(tt.args)...)
		out, _ := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.HasPrefix(string(out), tt.says) {
			t.Errorf("%s %s: got status %d, %q; want %d, %q", tt.env, tt.args, status, out, tt.status, tt.says)
		}
		if lines := strings.Count(string(out), "\n"); tt.status != 0 && lines != 1 {
			t.Errorf("%s %s: got %d lines, want 1", tt.env, tt.args, lines)
		}
	}
}

// SIGTERM under load: each request that the server took up is answered and counted.
func TestTerminateUnderLoad(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	p := startProcess(t, "REDIS_URL="+n.url, "REDIS_KEY="+n.key, "REDIS_TIMEOUT=5s", "SHUTDOWN_DELAY=500ms")
	var mu sync.Mutex
	var numbers []int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for {
				resp, body, err := get("GET", p.url)
				if resp == nil && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)) {
					return // the listener has closed
				}
				var instance string
				var number, total int64
				_, scanErr := fmt.Sscanf(body, strings.Replace(withTotal, ".", "", 1), &instance, &number, &total)
				if err != nil || scanErr != nil {
					t.Errorf("got %q, %v, %v", body, err, scanErr)
					return
				}
				mu.Lock()
				numbers = append(numbers, number)
				mu.Unlock()
			}
		})
	}
	p.awaitReady(t)
	time.Sleep(100 * time.Millisecond)
	p.Process.Signal(syscall.SIGTERM)
	wg.Wait()
	status, log := p.wait()
	if status != 0 || !strings.Contains(log, "msg=stop handled="+strconv.Itoa(len(numbers))+"\n") {
		t.Errorf("got status %d after %d answers\n%s", status, len(numbers), log)
	}
	oneTo(t, numbers)
	n.total(t, int64(len(numbers)))
}

// SIGTERM, Ctrl-C and a terminal that hangs up are a stop. Two signals within a second are one, and
// a later one ends the process at once.
func TestSignals(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		signal syscall.Signal
		delay  string
		pause  time.Duration // before it is sent again; 0 for never
		status int
	}{
		{signal: syscall.SIGTERM},
		{signal: syscall.SIGINT},
		{signal: syscall.SIGHUP},
		{signal: syscall.SIGTERM, delay: "500ms", pause: 200 * time.Millisecond},
		{signal: syscall.SIGTERM, delay: "1h", pause: 1200 * time.Millisecond, status: -1}, // by the signal
	} {
		p := startProcess(t, "SHUTDOWN_DELAY="+tt.delay)
		p.Process.Signal(tt.signal)
		if tt.pause > 0 {
			time.Sleep(tt.pause)
			p.Process.Signal(tt.signal)
		}
		if status, log := p.wait(); status != tt.status || strings.Contains(log, "msg=stop ") != (status == 0) {
			t.Errorf("%v, and again after %v: got status %d, want %d\n%s", tt.signal, tt.pause, status, tt.status, log)
		}
	}
}

// A connection that has sent nothing, as browsers open, does not hold up a stop.
func TestStopWithUnusedConnection(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	nc, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	get("GET", p.url) // the server has taken both connections then
	began := time.Now()
	p.Process.Signal(syscall.SIGTERM)
	if status, log := p.wait(); status != 0 || time.Since(began) > 3*time.Second {
		t.Errorf("got status %d after %v, want 0 within 3 s\n%s", status, time.Since(began), log)
	}
}

// The log has the start, each change of Redis with its cause, the stop and what it waits for.
func TestLog(t *testing.T) {
	t.Parallel()
	m := miniredis.RunT(t)
	m.RequireAuth("secret")
	addr := m.Addr()
	m.Close()
	p := startProcess(t, "REDIS_URL=redis://:secret@"+addr, "REDIS_TIMEOUT=300ms")
	status := func() int {
		resp, _, err := get("GET", p.url)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	if got := status(); got != 503 {
		t.Errorf("without Redis: got %d, want 503", got)
	}
	time.Sleep(2 * lookInterval) // until that is logged
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	p.awaitReady(t)
	for status() != 200 {
		time.Sleep(10 * time.Millisecond)
	}
	m.FlushAll()
	if got := status(); got != 200 {
		t.Errorf("after FLUSHALL: got %d, want 200", got)
	}
	p.Process.Signal(syscall.SIGTERM)
	code, log := p.wait()
	var got []string
	for _, m := range regexp.MustCompile(`msg=("[^"]*"|\S+)`).FindAllStringSubmatch(log, -1) {
		got = append(got, strings.Trim(m[1], `"`))
	}
	want := []string{"start", "cannot count in Redis", "restored what Redis lacked", "counting in Redis again",
		"restored what Redis lacked", "stopping", "waiting until Redis and the other instances know what was counted here; a second signal ends it", "stop"}
	if code != 0 || !slices.Equal(got, want) {
		t.Errorf("got status %d, %q; want %q\n%s", code, got, want, log)
	}
	_, after, _ := strings.Cut(log, " after=")
	after, _, _ = strings.Cut(after, "\n")
	if away, err := time.ParseDuration(after); err != nil || away < 2*lookInterval+epochWait {
		t.Errorf("Redis was away for %q, %v; want %v or more", after, err, 2*lookInterval+epochWait)
	}
	for _, part := range []string{" redis=" + addr, " go=go1.", " version=dev", ` cause="` + addr + ": ", " after=", " requests="} {
		if !strings.Contains(log, part) || strings.Contains(log, "secret") {
			t.Errorf("want %q, and no password, in the log:\n%s", part, log)
		}
	}
}

// Compose and the chart give their Redis user what the page says that the service needs.
func TestPermissionsAreTheSameEverywhere(t *testing.T) {
	t.Parallel()
	const permissions = "-@all +eval +evalsha +hmget +hset +hsetnx +hgetall +hget"
	plain := strings.NewReplacer("'", "", `"`, "", ",", "", "[", "", "]", "") // without YAML's signs
	for _, file := range []string{"docker-compose.yml", "helm/templates/redis-deployment.yaml", "helm/README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		words := strings.Join(strings.Fields(plain.Replace(string(text))), " ")
		if !strings.Contains(words, permissions) {
			t.Errorf("%s does not have %s", file, permissions)
		}
	}
}

// A request does not wait for the round trip of another, up to eight at a time; those beyond share
// the next command. An instance that is asked by hand has one connection.
func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials, commands atomic.Int64
		c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
			if cmd[0] == "DIAL" {
				dials.Add(1)
				return "+OK"
			}
			time.Sleep(100 * time.Millisecond)
			return fmt.Sprintf(":%d\r\n", 10*commands.Add(1))
		}).server(t, "redis://fake"))
		for range 20 {
			c.next()
		}
		if dials.Load() != 1 || len(c.entries) != 1 {
			t.Errorf("got %d connections and %d entries, want one", dials.Load(), len(c.entries))
		}
		type told struct {
			n, total int64
			took     time.Duration
		}
		var got, want [10]told
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				began := time.Now()
				n, total, _ := c.next()
				got[i] = told{n, total, time.Since(began)}
			})
			time.Sleep(10 * time.Millisecond)
			want[i] = told{int64(21 + i), int64(210 + 10*i), 100 * time.Millisecond}
		}
		// The ninth comes after 80 ms and waits until the first connection is free, after 100.
		want[8] = told{29, 289, 120 * time.Millisecond}
		want[9] = told{30, 290, 110 * time.Millisecond}
		wg.Wait()
		if closeAll(c); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// What users see while Redis fails: for less than REDIS_TIMEOUT no error, for longer a 503 after
// twice that at the most and then at once, and soon after its return the number again. Whatever
// happens, each request is counted once.
func TestRedisFails(t *testing.T) {
	const loading, noPassword, password = "-LOADING Redis is loading\r\n", "redis://fake", "redis://:secret@fake"
	for _, tt := range []struct {
		name    string
		url     string
		timeout time.Duration
		fault   string
		lasts   time.Duration
		fails   bool
		entries int64 // in the ledger from before
	}{
		{"refuses for 0.95 s", noPassword, time.Second, closed, 950 * time.Millisecond, false, 0},
		{"refuses for 0.95 s, with a password", password, time.Second, closed, 950 * time.Millisecond, false, 0},
		{"is silent for 0.95 s", noPassword, time.Second, silent, 950 * time.Millisecond, false, 0},
		{"is silent for 0.95 s, with a password", password, time.Second, silent, 950 * time.Millisecond, false, 0},
		{"loads for 0.95 s, with a password", password, time.Second, loading, 950 * time.Millisecond, false, 0},
		{"refuses for 4.8 of 5 s", noPassword, 5 * time.Second, closed, 4800 * time.Millisecond, false, 0},
		{"is silent for 4.8 of 5 s", noPassword, 5 * time.Second, silent, 4800 * time.Millisecond, false, 0},
		{"refuses for 5 s", noPassword, time.Second, closed, 5 * time.Second, true, 4000},
		{"is silent for 5 s", noPassword, time.Second, silent, 5 * time.Second, true, 0},
		{"loads for 5 s", password, time.Second, loading, 5 * time.Second, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			net := newNetwork(t)
			var numbers, totals []int64
			synctest.Test(t, func(t *testing.T) {
				s := fakeRedis(net.answer).server(t, tt.url)
				s.timeout = tt.timeout
				c := newCounter("host:1", net.key, s)
				for i := range tt.entries {
					c.entries[fmt.Sprint("host:2/", i)] = entry{1, 0}
				}
				start(t, c)
				c.next() // waits until the instance is ready
				numbers, totals = []int64{1}, []int64{tt.entries + 1}
				var mu sync.Mutex
				var wg sync.WaitGroup
				began := time.Now()
				fails, returns := time.Second, time.Second+tt.lasts
				known := fails + 2*tt.timeout + maxPause       // by then Redis is known to be down
				again := returns + lookInterval + tt.timeout/2 // by then it is known to be back
				ask := func() {
					asked := time.Since(began)
					n, total, err := c.next()
					took := time.Since(began) - asked
					mu.Lock()
					defer mu.Unlock()
					if numbers = append(numbers, n); err == nil {
						totals = append(totals, total)
					}
					quick := asked+took < fails || asked > again || asked > known && asked < returns
					if took > 2*tt.timeout+maxPause || quick && took > 0 || err != nil && (asked < fails-2*tt.timeout || asked > again) {
						t.Errorf("asked after %v: answered after %v, %v", asked, took, err)
					}
				}
				time.AfterFunc(fails, func() { net.set(tt.fault) })
				time.AfterFunc(returns, func() { net.set(carried) })
				for time.Since(began) < again+time.Second {
					wg.Go(ask)
					time.Sleep(25 * time.Millisecond)
				}
				wg.Wait()
				time.Sleep(2 * lookInterval)
			})
			if failed := len(numbers) - len(totals); failed > 0 != tt.fails {
				t.Errorf("got %d errors, want some: %t", failed, tt.fails)
			}
			net.total(t, tt.entries+int64(len(numbers)))
			oneTo(t, numbers)
			slices.Sort(totals)
			if n := len(slices.Compact(slices.Clone(totals))); n != len(totals) {
				t.Errorf("got %d different numbers of the cluster in %d answers", n, len(totals))
			}
		})
	}
}

// A cluster is some instances in a bubble that share a Redis, and how to stop each of them at once.
type cluster struct {
	*testing.T
	*network
	created  time.Time // when the first instance looked first
	counters []*counter
	stop     []func()
	latest   int64 // number that was told
}

func newCluster(t *testing.T, n *network, instances int) *cluster {
	c := &cluster{T: t, network: n, created: time.Now()}
	for range instances {
		c.start(n.server(t))
	}
	return c
}

// start starts an instance and returns its place.
func (c *cluster) start(redis *redisServer) int {
	i := len(c.counters)
	c.counters = append(c.counters, newCounter(fmt.Sprint("host:", i), c.key, redis))
	c.stop = append(c.stop, start(c.T, c.counters[i]))
	return i
}

// ask asks an instance, which must tell the next number, after a wait for an epoch at the most.
func (c *cluster) ask(when string, i int) {
	c.Helper()
	began := time.Now()
	_, got, err := c.counters[i].next()
	if c.latest++; got != c.latest || err != nil || time.Since(began) > epochWait+2*lookInterval {
		c.Errorf("%s: instance %d tells %d after %v, %v; want %d", when, i, got, time.Since(began), err, c.latest)
	}
}

// askUntilUp asks an instance until it tells a number, which must be that of all requests.
func (c *cluster) askUntilUp(when string, i int) {
	c.Helper()
	got, err := int64(0), error(errLost)
	for err != nil {
		time.Sleep(10 * time.Millisecond)
		c.latest++
		_, got, err = c.counters[i].next()
	}
	if got != c.latest {
		c.Errorf("%s: instance %d tells %d, want %d", when, i, got, c.latest)
	}
}

// afterLook waits until d after a look of the first instance, which is before one where d is
// negative. Its looks take no time.
func (c *cluster) afterLook(d time.Duration) {
	time.Sleep(lookInterval + d - time.Since(c.created)%lookInterval)
}

// A number is never told twice, and each is one more than the one before it, when Redis loses its
// data: whoever is asked, whatever instances do meanwhile, and when people change what it holds.
func TestThroughALoss(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, n, 4)
		set := func(field, value string) func() {
			return func() { n.do([]string{"HSET", n.key, field, value}) }
		}
		for _, step := range []struct {
			name   string
			first  int // is asked before it, if not negative
			pause  time.Duration
			happen func()
			then   int // is asked afterwards
		}{
			{"another one is asked", 0, 0, n.forget, 1},
			{"the same is asked", 0, 0, n.forget, 0},
			{"one is asked that has never counted", 0, 0, n.forget, 3},
			{"one is asked that starts just then", 0, 0, func() { n.forget(); c.start(n.server(t)) }, 4},
			{"it starts just before", 0, 0, func() { c.start(n.server(t)); n.forget() }, 5},
			{"again within the wait", 0, 0, func() { n.forget(); time.Sleep(time.Second); n.forget() }, 1},
			{"an instance has crashed", 2, lookInterval + time.Millisecond, func() { c.stop[2](); n.forget() }, 0},
			{"an instance has ended", 3, 0, func() { c.stop[3](); c.counters[3].end(t.Context()); n.forget() }, 1},
			{"the same again", -1, 0, n.forget, 0},
			{"an epoch without a name", 0, 0, set("epoch", ""), 1},
			{"an epoch that nobody knows", 0, 0, set("epoch", "x"), 1},
			{"a field that is no entry", 0, 0, set("note", "hello"), 1},
			{"the total is raised by hand", 0, 0, func() { set("total", "1000")(); c.latest = 1000 }, 1},
			{"and lowered", 0, 0, func() { set("total", "500")(); c.latest = 500 }, 1},
		} {
			if step.first >= 0 {
				c.ask(step.name+", first", step.first)
			}
			time.Sleep(step.pause)
			step.happen()
			c.ask(step.name, step.then)
		}
		began := time.Now()
		if c.ask("one starts in an epoch that is open", c.start(n.server(t))); time.Since(began) > retryInterval {
			t.Errorf("it waits for %v, want %v at the most", time.Since(began), retryInterval)
		}
		_, sum := n.ledger(t)
		time.Sleep(time.Second)
		if got := c.counters[4].current().total; got != c.latest {
			t.Errorf("one that is not asked knows of %d requests, want %d", got, c.latest)
		}
		c.latest = sum // until the next loss a number that was set by hand holds
		n.forget()
		c.ask("what was set by hand is gone", 0)
		l, _ := n.ledger(t)
		for id := range l.entries {
			n.do([]string{"HDEL", n.key, id})
		}
		time.Sleep(time.Second)
		if got, _ := n.ledger(t); got.total < 2*sum {
			t.Errorf("got the total %d; want entries that were removed to come back, on top of %d", got.total, sum)
		}
	})
}

// An instance waits for six looks and no more where nobody else restores anything, also beside one
// that counts already in the new epoch.
func TestWaitForAnEpoch(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for instances := 1; instances <= 2; instances++ {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, n, 0)
			for i := range instances {
				c.start(n.server(t))
				c.ask("before", i)
				c.afterLook(lookInterval * 3 / 4)
			}
			time.Sleep(time.Second) // the first one knows what the second has counted
			c.afterLook(-time.Millisecond)
			n.forget()
			var others sync.WaitGroup
			for range connections { // most have no entry yet
				others.Go(func() { c.counters[0].next() })
				time.Sleep(10 * time.Microsecond)
			}
			began := time.Now()
			c.counters[instances-1].next()
			most := epochWait + retryInterval + time.Duration(instances-1)*lookInterval
			if got := time.Since(began); got > most {
				t.Errorf("%d instances: got a wait of %v, want %v at the most", instances, got, most)
			}
			others.Wait()
		})
	}
}

// One that comes from another epoch waits even where the one of an older copy is open: there others
// have still to restore what it lacks.
func TestCopyOfAnEarlierEpoch(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, n, 1)
		time.Sleep(lookInterval / 2) // each look comes half an interval after one of the first instance
		c.start(n.server(t))
		c.ask("before", 0)
		older := n.copy()
		n.forget()
		c.ask("in the next epoch", 0)
		c.afterLook(-time.Millisecond)
		c.ask("not yet read by the first", 1)
		n.goBack(older)
		c.ask("back to the copy", 0)
	})
}

// The entries of a long ledger that nobody else may know are restored first.
func TestOwnEntriesFirst(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		var read atomic.Bool
		var first []string // command after the ledger was read
		c := newCounter("host:1", n.key, fakeRedis(func(cmd []string) string {
			if read.Swap(cmd[0] == "HGETALL") {
				first = cmd
			}
			return n.answer(cmd)
		}).server(t, "redis://fake"))
		for i := range 3 * chunk {
			c.entries[fmt.Sprint("host:2/", i)] = entry{1, 0}
		}
		start(t, c)
		c.next()
		n.forget()
		time.Sleep(lookInterval)
		synctest.Wait()
		if own := "host:1/"; len(first) < 8 || !strings.HasPrefix(first[7], own) {
			t.Errorf("restored first: got %q, want entries of %s", first[:min(len(first), 8)], own)
		}
	})
}

// Redis may lose its data, and another instance begin an epoch, before any command of an instance
// that looks at it. Nobody opens an epoch before its time.
func TestLossDuringALook(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for at := range 16 {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			all := at%2 == 0 // else others have restored the entries
			at := at / 2
			c := newCluster(t, n, 1)
			var armed atomic.Bool
			var commands atomic.Int64
			var lostAt time.Time
			i := c.start(fakeRedis(func(cmd []string) string {
				if armed.Load() && cmd[0] != "DIAL" && commands.Add(1) == int64(at+1) {
					if all {
						n.forget()
					}
					n.do([]string{"HSET", n.key, "epoch", crand.Text()})
					lostAt = time.Now()
				}
				if took := time.Since(lostAt); cmd[0] == "HSET" && took < epochWait {
					t.Errorf("lost before command %d: an epoch was opened after %v", at, took)
				}
				return n.answer(cmd)
			}).server(t, "redis://fake"))
			for range 3 {
				c.ask("before", 0)
				c.ask("before", i)
			}
			time.Sleep(lookInterval)
			c.stop[0]() // only one opens an epoch
			c.ask("before", i)
			armed.Store(true)
			time.Sleep(6 * time.Second)
			c.ask(fmt.Sprint("lost before command ", at), i)
			if commands.Load() <= int64(at) {
				t.Errorf("got %d commands, want more than %d", commands.Load(), at)
			}
		})
	}
}

// An epoch opens once each instance has had time to restore what it knows, and no entries have come
// for as long. Requests that are counted meanwhile, by one for which Redis was down, do not matter.
func TestEpochOpens(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	set := func(field, value string) { n.do([]string{"HSET", n.key, field, value}) }
	for _, tt := range []struct {
		name   string
		happen func(second int) // in each of the first five seconds
		stall  time.Duration    // after the first two looks Redis stands still
		want   time.Duration    // until it is open
	}{
		{"entries come", func(second int) { set(fmt.Sprint(second), "1 1") }, 0, 4*time.Second + epochWait},
		{"an entry rises", func(second int) { set("a", fmt.Sprint(second, " 1")) }, 0, epochWait},
		{"Redis stands still: others cannot look either", func(int) {}, 1900 * time.Millisecond, 1900*time.Millisecond + 5*lookInterval},
		{"lost again, and a late command has the same epoch begin", func(second int) {
			if second == 1 {
				l, _ := n.ledger(t)
				n.forget()
				set("epoch", l.epoch)
			}
		}, 0, time.Second + epochWait},
	} {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			c := newCounter("host:1", n.key, fakeRedis(func(cmd []string) string {
				if at := time.Since(began); at > lookInterval && at < lookInterval+tt.stall {
					time.Sleep(lookInterval + tt.stall - at)
				}
				return n.answer(cmd)
			}).server(t, "redis://fake"))
			c.entries["host:2/Y/1"] = entry{7, 7}
			start(t, c)
			for i := range 5 {
				time.AfterFunc(time.Duration(i)*time.Second+time.Millisecond, func() { tt.happen(i) })
			}
			for c.current().notReady != nil && time.Since(began) < 10*time.Second {
				time.Sleep(10 * time.Millisecond)
			}
			if took := time.Since(began); took < tt.want || took > tt.want+3*lookInterval {
				t.Errorf("%s: the epoch is open after %v, want %v", tt.name, took, tt.want)
			}
		})
	}
}

// Where the ledger cannot be read, requests are answered with their number as long as Redis has
// lost nothing; then in good time with an error. An instance that has never read it is not ready.
func TestLedgerCannotBeRead(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, n, 1)
		c.ask("before", 0)
		n.set(unread)
		for range 3 {
			time.Sleep(3 * time.Second)
			c.ask("unread", 0)
		}
		i := c.start(n.server(t))
		time.Sleep(5 * time.Second)
		if err := c.counters[i].current().notReady; err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("an instance that has not read the ledger: got %v, want its cause", err)
		}
		n.forget()
		began := time.Now()
		if _, got, err := c.counters[0].next(); err == nil || time.Since(began) > 4*time.Second {
			t.Errorf("after a loss: got %d, %v after %v; want an error within 4 s", got, err, time.Since(began))
		}
		n.set(carried)
		time.Sleep(4 * time.Second)
		c.latest++
		c.ask("read again", 0)
	})
}

// A request that fails during a look that succeeds is not forgotten, and those that are answered 503
// meanwhile do not keep Redis down.
func TestFailureDuringALook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refuses atomic.Bool
		c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
			if refuses.Load() {
				return "-NOPERM\r\n"
			}
			return ":7\r\n"
		}).server(t, "redis://fake"))
		c.redis.timeout = 20 * time.Millisecond
		c.lookConn.server = fakeRedis(func(cmd []string) string {
			if cmd[0] != "DIAL" {
				time.Sleep(100 * time.Millisecond) // so a look begins each 0.35 s
			}
			return ":0\r\n"
		}).server(t, "redis://fake")
		start(t, c)
		time.Sleep(360 * time.Millisecond) // the second look is under way
		refuses.Store(true)
		c.next()
		refuses.Store(false)
		time.Sleep(100 * time.Millisecond)
		if c.current().down == nil {
			t.Error("a request has failed, and Redis is said to be up")
		}
		for range 50 {
			c.next()
			time.Sleep(10 * time.Millisecond)
		}
		if err := c.current().down; err != nil {
			t.Errorf("Redis is up for half a second, and said to be down: %v", err)
		}
	})
}

// The first number after an outage is that of all requests, those that were answered 503, too.
func TestFirstNumberAfterAnOutage(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		redis := n.server(t)
		redis.timeout = 5 * time.Second
		c := newCluster(t, n, 0)
		c.start(redis)
		c.ask("before", 0)
		n.set(closed)
		var wg sync.WaitGroup
		for range 3 { // on connections of their own
			c.latest++
			wg.Go(func() { c.counters[0].next() })
			time.Sleep(time.Millisecond)
		}
		wg.Wait()
		time.AfterFunc(20*time.Second, func() { n.set(carried) })
		c.askUntilUp("afterwards", 0)
	})
}

// A Redis that was down is up again, however slow it is now.
func TestSlowOnceItIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		var slow atomic.Int64
		c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
			switch {
			case away.Load():
				return closed
			case cmd[0] != "DIAL":
				time.Sleep(time.Duration(slow.Load()))
			}
			if cmd[0] == "HGETALL" {
				return "*0\r\n"
			}
			return ":7\r\n"
		}).server(t, "redis://fake"))
		c.redis.timeout = 5 * time.Second
		start(t, c)
		away.Store(true)
		if c.next(); c.current().down == nil {
			t.Error("Redis is away, and not down")
		}
		slow.Store(int64(400 * time.Millisecond))
		away.Store(false)
		time.Sleep(3 * time.Second)
		if _, _, err := c.next(); err != nil {
			t.Errorf("it is back for 3 s: got %v", err)
		}
	})
}

// Redis comes back empty after most of REDIS_TIMEOUT, while an instance waits on a connection that is
// silent, as it leads to where Redis was.
func TestSilentThenEmpty(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for after := 3 * time.Second; after < 9*time.Second; after += 400 * time.Millisecond {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			var away atomic.Bool
			server := func(whileAway string) *redisServer {
				s := fakeRedis(func(cmd []string) string {
					switch {
					case !away.Load():
						return n.answer(cmd)
					case cmd[0] == "DIAL":
						return whileAway
					}
					return silent
				}).server(t, "redis://fake")
				s.timeout = 10 * time.Second
				return s
			}
			c := newCluster(t, n, 0)
			c.start(server(closed))
			c.start(server("+OK\r\n"))
			for range 5 {
				c.ask("before", 1)
			}
			n.forget()
			away.Store(true)
			time.Sleep(after)
			away.Store(false)
			if _, got, err := c.counters[0].next(); got != 6 || err != nil {
				t.Errorf("back after %v: got %d, %v; want 6", after, got, err)
			}
		})
	}
}

// Redis loses its data and then refuses writes for longer than the wait: nobody restores anything in
// that time, so it does not count.
func TestRefusesAfterALoss(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for after := 10 * time.Second; after < 10*time.Second+maxPause; after += maxPause / 4 {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			var refuses atomic.Bool
			redis := fakeRedis(func(cmd []string) string {
				writes := cmd[0] == "HSET" || cmd[0] == "EVALSHA" &&
					strings.Contains(n.do([]string{"HGET", n.key, "epoch"}), cmd[4])
				if refuses.Load() && writes {
					return "-MISCONF no\r\n"
				}
				return n.answer(cmd)
			}).server(t, "redis://fake")
			c := newCluster(t, n, 0)
			c.start(redis)
			time.Sleep(lookInterval / 2)
			c.start(redis)
			c.ask("before", 0)
			time.Sleep(time.Second)
			c.afterLook(-time.Millisecond)
			c.ask("not yet read by the first", 1)
			n.forget()
			time.Sleep(2 * time.Millisecond) // the first has looked, and begun the next epoch
			refuses.Store(true)
			time.Sleep(after)
			refuses.Store(false)
			c.askUntilUp(fmt.Sprint("after ", after), 0)
		})
	}
}

// Nothing waits for ever: where Redis loses its data again and again, requests are answered in the
// end, and with their number soon after the last loss.
func TestLostAgainAndAgain(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	const lasts = 20 * time.Second
	const most = 10 * time.Second // four times REDIS_TIMEOUT, and 6 s
	var asked int64
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, n, 2)
		var wg sync.WaitGroup
		failed, began := atomic.Int64{}, time.Now()
		for time.Since(began) < lasts {
			n.forget()
			for range 3 {
				asked++
				counter := c.counters[asked%2]
				wg.Go(func() {
					began := time.Now()
					if _, _, err := counter.next(); err != nil {
						failed.Add(1)
					}
					if took := time.Since(began); took > most {
						t.Errorf("answered after %v, want %v at the most", took, most)
					}
				})
			}
			time.Sleep(300 * time.Millisecond)
		}
		for i := range c.counters {
			err := error(errLost)
			for ; err != nil && time.Since(began) < lasts+3*time.Second; time.Sleep(10 * time.Millisecond) {
				asked++
				_, _, err = c.counters[i].next()
			}
			if err != nil {
				t.Errorf("instance %d: got %v, want a number within 3 s of the last loss", i, err)
			}
		}
		if wg.Wait(); failed.Load() == 0 {
			t.Error("got no 503, want some")
		}
		time.Sleep(time.Second)
	})
	n.total(t, asked)
}

// The ledger is read where the total has changed, and less often the longer it is.
func TestInterval(t *testing.T) {
	for _, tt := range []struct {
		entries int
		counted int64 // by others before each look
		want    int64
	}{{0, 0, 1}, {0, 1, 40}, {1000, 1, 20}, {80_000, 1, 4}} {
		synctest.Test(t, func(t *testing.T) {
			var reads, total atomic.Int64
			list := []string{"epoch", "e", "open", "e"}
			for i := range tt.entries {
				list = append(list, strconv.Itoa(i), "0 0")
			}
			read := "*" + strings.TrimPrefix(string(encode(list...)), "*")
			c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
				switch {
				case cmd[0] == "HGETALL":
					reads.Add(1)
					return read
				case cmd[0] == "EVALSHA" && cmd[4] != "e":
					return "-" + string(errLost) + "\r\n"
				}
				return fmt.Sprintf(":%d\r\n", total.Add(tt.counted))
			}).server(t, "redis://fake"))
			start(t, c)
			time.Sleep(10 * time.Second)
			if got := reads.Load(); got < tt.want || got > tt.want+2 {
				t.Errorf("with %d entries: got %d reads in 10 s, want %d", tt.entries, got, tt.want)
			}
		})
	}
}

// How long an instance takes to end, and what Redis then knows.
func TestEnd(t *testing.T) {
	const others = 3 * lookInterval // until each has read the ledger
	for _, tt := range []struct {
		name    string
		asked   int           // requests
		idle    time.Duration // after them
		fault   string        // from then on
		lasts   time.Duration
		late    int           // requests as the fault begins
		forgets time.Duration // from then on; -1 for at once
		took    time.Duration
		total   int64
	}{
		{name: "after a request", asked: 3, took: others, total: 3},
		{name: "half a second after a request", asked: 3, idle: 500 * time.Millisecond, took: others - 500*time.Millisecond, total: 3},
		{name: "idle", asked: 3, idle: 2 * time.Second, took: 0, total: 3},
		{name: "nothing was counted", took: 0},
		{name: "nothing was counted, Redis is away", fault: closed, lasts: time.Hour, took: 0},
		{name: "Redis forgets", asked: 3, forgets: 400 * time.Millisecond, took: 500*time.Millisecond + epochWait + others, total: 3},
		{name: "idle, and Redis has forgotten", asked: 3, idle: 2 * time.Second, forgets: -1, took: epochWait + others, total: 3},
		{name: "Redis is away", asked: 3, fault: closed, lasts: 3 * time.Second, took: 2800*time.Millisecond + others, total: 3},
		{name: "replies are lost", asked: 3, fault: lost, lasts: 3 * time.Second, late: 1,
			took: 2800*time.Millisecond + others, total: 4},
		{name: "counted while Redis is away", asked: 3, idle: time.Second, fault: closed, lasts: 3 * time.Second, late: 2,
			took: 2800*time.Millisecond + others, total: 5},
		{name: "the ledger cannot be read", asked: 3, fault: unread, lasts: time.Hour, took: 3500 * time.Millisecond, total: 3},
		{name: "Redis is away for good", asked: 3, fault: closed, lasts: time.Hour, took: drainTimeout, total: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			synctest.Test(t, func(t *testing.T) {
				c := newCounter("host:1", n.key, n.server(t))
				stop := start(t, c)
				time.Sleep(2*time.Second + lookInterval/2) // between two looks
				for range tt.asked {
					c.next()
				}
				time.Sleep(tt.idle)
				if tt.lasts > 0 {
					n.set(tt.fault)
					time.AfterFunc(tt.lasts, func() { n.set(carried) })
				}
				if tt.forgets > 0 {
					time.AfterFunc(tt.forgets, n.forget)
				} else if tt.forgets < 0 {
					n.forget()
				}
				began := time.Now()
				var wg sync.WaitGroup
				for range tt.late {
					wg.Go(func() { c.next() })
				}
				wg.Wait()
				stop()
				ctx, cancel := context.WithTimeout(t.Context(), drainTimeout)
				defer cancel()
				c.end(ctx)
				if took := time.Since(began); took < tt.took || took > tt.took+500*time.Millisecond {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
			n.total(t, tt.total)
		})
	}
}

// Redis may lose its data after a look has told it all, and be away as that look reads the ledger.
func TestEndsAsRedisRestarts(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		var armed atomic.Bool
		c := newCluster(t, n, 1)
		time.Sleep(lookInterval / 2)
		c.start(fakeRedis(func(cmd []string) string {
			if cmd[0] == "HGETALL" && armed.CompareAndSwap(true, false) {
				n.forget()
				n.set(closed)
				time.AfterFunc(900*time.Millisecond, func() { n.set(carried) })
			}
			return n.answer(cmd)
		}).server(t, "redis://fake"))
		c.ask("before", 0)
		time.Sleep(lookInterval)
		c.ask("last", 1)
		armed.Store(true)
		c.stop[1]()
		c.counters[1].end(t.Context())
		c.ask("afterwards", 0)
	})
}

// loseReply returns a Redis that carries out the next request to be counted once it is armed, runs
// between, and then loses the reply.
func (n *network) loseReply(t *testing.T, armed *atomic.Bool, between func()) *redisServer {
	return fakeRedis(func(cmd []string) string {
		answer := n.answer(cmd)
		if cmd[len(cmd)-1] == "" && armed.CompareAndSwap(true, false) {
			between()
			return closed
		}
		return answer
	}).server(t, "redis://fake")
}

// A request whose reply is lost gets its own number when the command is repeated, whatever other
// requests, looks and losses come between, if anybody has seen it counted.
func TestLostReply(t *testing.T) {
	for _, between := range []string{
		"",
		"1 asks, 1 looks",
		"2 asks, 2 asks",
		"2 looks, Redis forgets, 2 asks",
		"2 looks, Redis forgets, 1 asks",
		"2 looks, Redis forgets, 2 looks, Redis forgets, 3 asks",
	} {
		t.Run(between, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			synctest.Test(t, func(t *testing.T) {
				var armed atomic.Bool
				var c *cluster
				var others sync.WaitGroup
				c = newCluster(t, n, 0)
				c.start(n.loseReply(t, &armed, func() {
					for step := range strings.SplitSeq(between, ", ") {
						who, what, _ := strings.Cut(step, " ")
						i, _ := strconv.Atoi(who)
						switch what {
						case "asks":
							others.Go(func() { c.counters[i-1].next() })
						case "looks":
							time.Sleep(lookInterval/2 + time.Millisecond) // the command is not sent again yet
						case "forgets":
							n.forget()
						}
						synctest.Wait()
					}
				}))
				c.start(n.server(t))
				c.start(n.server(t))
				for i := range 3 {
					c.ask("first", i)
				}
				time.Sleep(lookInterval + lookInterval/2) // between two looks
				armed.Store(true)
				_, got, err := c.counters[0].next()
				if others.Wait(); got != 4 || err != nil {
					t.Errorf("got %d, %v; want 4", got, err)
				}
				time.Sleep(3 * time.Second)
				c.latest = 4 + int64(strings.Count(between, "asks"))
				c.ask("at the end", 1)
			})
		})
	}
}

// What is not promised: in these cases a number is told twice. Nothing is ever counted twice or
// lost.
func TestNotPromised(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	for _, tt := range []struct {
		name   string
		happen func(ask func(i int), armed *atomic.Bool, way *network)
	}{
		{"Redis has counted a request, and loses it before anybody has seen that", func(ask func(i int), armed *atomic.Bool, way *network) {
			armed.Store(true)
			ask(0)
		}},
		{"an instance is cut off for longer than the wait", func(ask func(i int), armed *atomic.Bool, way *network) {
			ask(0)
			way.set(closed)
			n.forget()
			ask(1)
			way.set(carried)
		}},
		{"Redis goes back to an older copy", func(ask func(i int), armed *atomic.Bool, way *network) {
			older := n.copy()
			ask(0)
			n.goBack(older)
			ask(1)
		}},
	} {
		n.forget()
		synctest.Test(t, func(t *testing.T) {
			var told []int64
			var armed atomic.Bool
			way := &network{key: n.key, do: n.do, fault: carried}
			c := newCluster(t, n, 0)
			ask := func(i int) {
				_, got, err := c.counters[i].next()
				if told = append(told, got); err != nil {
					t.Errorf("%s: %v", tt.name, err)
				}
			}
			c.start(way.loseReply(t, &armed, func() {
				ask(1)
				n.forget()
			}))
			c.start(n.server(t))
			ask(0)
			ask(1)
			time.Sleep(lookInterval)
			tt.happen(ask, &armed, way)
			time.Sleep(5 * time.Second)
			c.latest = int64(len(told))
			if slices.Sort(told); len(slices.Compact(told)) == int(c.latest) {
				t.Errorf("%s: got %v, want a number twice", tt.name, told)
			}
			c.ask(tt.name+", at the end", 1)
		})
	}
}

// A schedule is a random run of instances that share a Redis, over networks that lose, delay and
// reorder what they carry, in which people ask and things break for a while.
type schedule struct {
	*network
	t *testing.T
	kind
	wg sync.WaitGroup // all that goes on

	mu      sync.Mutex
	rng     *rand.Rand
	all     []*instance
	told    map[int64]bool // numbers
	latest  int64          // the highest of them
	checked int            // how many were
	safe    time.Time      // until then others may not know what one has counted that is gone
	lostAt  time.Time      // when Redis last lost its data
	copied  []string       // what Redis held at some time
}

// A kind says what may happen in a schedule.
type kind struct {
	name  string
	loses bool          // Redis loses its data
	older bool          // it goes back to an older copy
	cut   time.Duration // for how long an instance is cut off
}

// ordered says whether all numbers must be in order, each once. An instance that is cut off for
// 0.8 s needs half a second more for an attempt that began in that time.
func (k kind) ordered() bool { return !k.loses || k.cut <= 800*time.Millisecond && !k.older }

// An instance of a schedule.
type instance struct {
	s       *schedule
	counter *counter
	stop    func()

	// Guarded by schedule.mu.
	state     string          // living, ending, ended or crashed
	cutTill   time.Time       // until then nothing passes
	cutBy     string          // silent, closed, or lost: Redis carries commands out
	unsettled map[string]bool // entries that Redis has raised, for requests that are not answered yet

	asked, answered, numbered int64 // requests, those answered, and of these with a number
	highest                   int64 // of these numbers
}

// random returns a number below n.
func (s *schedule) random(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rng.IntN(n)
}

// pause sleeps for up to most. No two pauses are of one length, so a schedule can be repeated.
func (s *schedule) pause(most time.Duration) { time.Sleep(time.Duration(s.random(int(most)))) }

// start starts an instance.
func (s *schedule) start() {
	in := &instance{s: s, state: "living", unsettled: map[string]bool{}}
	in.counter = newCounter("host:1", s.key, fakeRedis(in.answer).server(s.t, "redis://fake"))
	in.stop = start(s.t, in.counter)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, in)
}

// answer is the network of an instance.
func (in *instance) answer(cmd []string) string {
	s := in.s
	s.pause(10 * time.Millisecond)
	s.mu.Lock()
	crashed, cut, by, chance := in.state == "crashed", time.Until(in.cutTill), in.cutBy, s.rng.IntN(100)
	s.mu.Unlock()
	switch {
	case crashed, cut > 0 && by == closed, chance < 1:
		return closed
	case cmd[0] == "DIAL" && cut > 0:
		return silent
	case cmd[0] == "DIAL":
		return "+OK\r\n"
	case cut > 0 && by == silent && chance < 50:
		return silent
	case cut > 0 && by == silent:
		time.Sleep(cut) // Redis gets it after it was given up
	}
	answer := s.do(cmd)
	if cmd[len(cmd)-1] == "" && answer[0] == ':' {
		s.mu.Lock()
		in.unsettled[cmd[len(cmd)-3]] = in.answered < in.asked
		s.mu.Unlock()
	}
	s.pause(10 * time.Millisecond)
	if chance > 98 || cut > 0 && by == lost {
		return closed
	}
	return answer
}

// ask sends a request to an instance. Its number must be new, and higher than all that were told
// before it.
func (s *schedule) ask(in *instance) {
	s.mu.Lock()
	in.asked++
	before := s.latest
	if known := in.counter.current().total; !s.loses && known < in.highest {
		s.t.Errorf("an instance knows the total %d, and has told %d", known, in.highest)
	}
	s.mu.Unlock()
	_, total, err := in.counter.next()
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.answered++; in.answered == in.asked {
		clear(in.unsettled)
	}
	if err != nil || in.state == "crashed" {
		return
	}
	in.numbered++
	in.highest = max(in.highest, total)
	if s.ordered() {
		if s.checked++; total <= before || s.told[total] {
			s.t.Errorf("got request %d to the cluster after %d was told; told before: %t", total, before, s.told[total])
		}
	}
	s.told[total], s.latest = true, max(s.latest, total)
}

// living returns the instances that are asked.
func (s *schedule) living() (living []*instance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, in := range s.all {
		if in.state == "living" {
			living = append(living, in)
		}
	}
	return living
}

// mayLose says whether Redis may lose its data: not before everybody was answered whom it has
// counted, and others know what an instance had counted that is gone.
func (s *schedule) mayLose() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, in := range s.all {
		for _, unsettled := range in.unsettled {
			if unsettled && in.state != "crashed" {
				return false
			}
		}
	}
	return !s.ordered() || time.Now().After(s.safe)
}

// event has one thing happen at random.
func (s *schedule) event() {
	living := s.living()
	in := living[s.random(len(living))]
	others := len(living) > 1 && !slices.ContainsFunc(living, func(i *instance) bool { return i.counter.current().notReady != nil })
	switch what := s.random(100); {
	case what < 12:
		for s.loses && !s.mayLose() {
			time.Sleep(time.Millisecond)
		}
		if s.loses {
			s.forget()
			s.lostAt = time.Now()
		}
	case what < 45:
		length := time.Duration(s.random(int(s.cut)))
		s.mu.Lock()
		defer s.mu.Unlock()
		if time.Since(in.cutTill) > 2*time.Second {
			in.cutTill = time.Now().Add(length)
			in.cutBy = []string{silent, closed, lost}[s.rng.IntN(3)]
		}
	case what < 65:
		if len(living) < 4 {
			s.start()
		}
	case what < 78:
		if others {
			s.mu.Lock()
			in.state = "ending"
			s.mu.Unlock()
			s.wg.Go(func() { s.end(in) })
		}
	case what < 90:
		if others && (!s.ordered() || time.Since(s.lostAt) > 2*time.Second) { // all is restored
			s.mu.Lock()
			defer s.mu.Unlock()
			in.state = "crashed"
			s.safe = time.Now().Add(2 * time.Second)
		}
	case s.older && what < 95:
		s.copied = s.copy()
	case s.older && len(s.copied) > 0:
		s.goBack(s.copied)
	}
}

// end ends an instance once its requests are answered.
func (s *schedule) end(in *instance) {
	for answered := false; !answered; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		answered = in.answered == in.asked
		s.mu.Unlock()
	}
	in.stop()
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	in.counter.end(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	in.state = "ended"
	for _, other := range s.all {
		if time.Since(other.cutTill) < time.Second { // it may not have read the last counts
			s.safe = time.Now().Add(2 * time.Second)
		}
	}
}

// check checks what all have counted, once everything has arrived.
func (s *schedule) check() {
	l, sum := s.ledger(s.t)
	var least, most int64
	for _, in := range s.all {
		in.stop()
		most += in.asked
		switch {
		case in.state == "living" || s.ordered() && in.state == "ended":
			least += in.asked
		case s.ordered():
			least += in.numbered
		}
		own := int64(0)
		for _, id := range in.counter.ids {
			own += in.counter.entries[id].count
			if got, want := l.entries[id].count, in.counter.entries[id].count; in.state == "living" && got != want {
				s.t.Errorf("Redis has %d at %s, of which an instance knows %d", got, id, want)
			}
		}
		if own != in.asked || in.counter.n != in.asked || in.answered != in.asked {
			s.t.Errorf("an instance that is %s has counted %d, knows %d and answered %d of %d requests",
				in.state, in.counter.n, own, in.answered, in.asked)
		}
	}
	if l.total != sum || sum < least || sum > most {
		s.t.Errorf("got the total %d, and %d in the entries, want %d to %d", l.total, sum, least, most)
	}
}

// Whatever the network does, whoever starts, ends or crashes, and whatever Redis loses, each request
// is counted once. No number is told twice or is lower than one before it, either, unless an
// instance is cut off for long, or Redis goes back to an older copy.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	schedules := uint64(40)
	if realRedis != "" {
		schedules = 400 // a real Redis runs Lua ten times as fast
	}
	first := uint64(time.Now().UnixNano())
	if seed := os.Getenv("SEED"); seed != "" {
		first, _ = strconv.ParseUint(seed, 10, 64)
		schedules = 1
	}
	kinds := []kind{
		{name: "no loss", cut: 4 * time.Second},
		{name: "no loss, again", cut: 4 * time.Second},
		{name: "losses", loses: true, cut: 800 * time.Millisecond},
		{name: "losses, older copies, and instances cut off", loses: true, older: true, cut: 4 * time.Second},
	}
	for seed := first; seed < first+schedules; seed++ {
		kind := kinds[seed%uint64(len(kinds))]
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			synctest.Test(t, func(t *testing.T) { runSchedule(t, n, kind, seed) })
		})
	}
}

func runSchedule(t *testing.T, n *network, kind kind, seed uint64) {
	s := &schedule{network: n, t: t, kind: kind, rng: rand.New(rand.NewPCG(seed, 0)), told: map[int64]bool{}}
	for range 1 + s.rng.IntN(3) {
		s.start()
	}
	ctx, cancel := context.WithCancel(t.Context())
	for range 3 {
		s.wg.Go(func() {
			for ctx.Err() == nil {
				living := s.living()
				s.ask(living[s.random(len(living))])
				s.pause(400 * time.Millisecond)
			}
		})
	}
	for range 10 + s.random(30) {
		s.pause(800 * time.Millisecond)
		s.event()
	}
	cancel()
	s.wg.Wait()
	time.Sleep(8 * time.Second) // until everything has arrived, and all have looked
	s.check()
	t.Logf("%d instances, %d numbers told, %d checked", len(s.all), len(s.told), s.checked)
	if t.Failed() {
		t.Errorf("to repeat this: SEED=%d go test -run TestRandomSchedules", seed)
	}
}
