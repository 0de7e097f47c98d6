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
	fault string    // what comes of each command and dial: a reply, or one of those below
	held  []*packet // on their way
}

// What may come of a command, beside silent and closed.
const (
	carried = "carried" // Redis carries it out
	lost    = "lost"    // Redis carries it out, and then the connection is closed
	held    = "held"    // the test carries it
	unread  = "unread"  // Redis carries it out, but is silent where the ledger is read
)

// A packet is a command on its way.
type packet struct {
	cmd    []string
	answer chan string
}

// newNetwork returns the way to a miniredis of the test's own, or to the server at REDIS_URL. It
// is called outside of bubbles.
func newNetwork(t *testing.T) *network {
	n := &network{url: realRedis, key: "test:" + crand.Text(), fault: carried}
	if n.url == "" {
		n.url = "redis://" + miniredis.RunT(t).Addr()
	}
	var reply bytes.Buffer
	c := newConn(mustParse(t, n.url, 5*time.Second), "", "")
	if err := c.dial(c.server.addr, time.Now().Add(5*time.Second)); err != nil {
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
	dial := cmd[0] == "DIAL" || cmd[0] == "AUTH"
	p := &packet{cmd, make(chan string)}
	if fault == held && !dial {
		n.held = append(n.held, p)
	}
	n.mu.Unlock()
	switch fault {
	case carried, lost, held, unread:
	default:
		return fault
	}
	switch {
	case dial:
		return "+OK\r\n"
	case fault == held:
		return <-p.answer
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
func (n *network) forget() { n.do([]string{"DEL", n.key, "{" + n.key + "}:ledger"}) }

// total returns the total that Redis has.
func (n *network) total() int64 {
	total, _ := readReply(replyReader(n.do([]string{"INCRBY", n.key, "0"})), ':')
	return total.n
}

// waiting returns how many packets are on their way.
func (n *network) waiting() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.held)
}

// take takes packet i from the way.
func (n *network) take(i int) *packet {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.held[i]
	n.held = slices.Delete(n.held, i, i+1)
	return p
}

// deliver has Redis carry out packet i, whose reply comes or is lost with the connection.
func (n *network) deliver(i int, lost bool) {
	p := n.take(i)
	answer := n.do(p.cmd)
	if lost {
		answer = closed
	}
	p.answer <- answer
	synctest.Wait()
}

// deliverAll delivers all packets, and those that follow.
func (n *network) deliverAll() {
	for synctest.Wait(); n.waiting() > 0; {
		n.deliver(0, false)
	}
}

// cut loses all packets, also those to come, and returns their commands.
func (n *network) cut() (lost [][]string) {
	n.set(closed)
	for synctest.Wait(); n.waiting() > 0; synctest.Wait() {
		p := n.take(0)
		lost = append(lost, p.cmd)
		p.answer <- closed
	}
	return lost
}

// start runs c until the end of the test.
func start(t *testing.T, c *counter) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.keepSynced(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		closeAll(c)
	})
}

// closeAll closes the TCP connections of counters, none of which may be in use.
func closeAll(counters ...*counter) {
	for _, c := range counters {
		for range len(c.pool) {
			conn := <-c.pool
			conn.close()
			c.pool <- conn
		}
	}
}

// syncOnce syncs over a connection of the pool.
func (c *counter) syncOnce() error {
	conn := c.take()
	defer func() { c.pool <- conn }()
	return c.sync(conn)
}

// A request is what a call of next was told, once it was.
type request struct {
	n, total int64
	err      error
	told     bool
}

// ask sends a request; its command is held by the network then.
func (c *counter) ask() *request {
	r := &request{}
	go func() {
		r.n, r.total, r.err = c.next()
		r.told = true
	}()
	synctest.Wait()
	return r
}

// newInstance returns an instance in this process, and its handler.
func newInstance(t *testing.T, instance, key string, redis *redisServer) (*httptest.Server, *handler) {
	h := &handler{counter: newCounter(instance, key, redis), instance: instance}
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
		{"HEAD /", cutOff, 503, map[string]string{"Retry-After": "1"}, "", 1},
		{"GET /", stopping, 200, map[string]string{"Connection": "close"}, first + "…", 1},
		{"POST /", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"POST /healthz", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"GET /favicon.ico", alone, 404, nil, "…", 0},
		{"GET /healthz", cutOff, 200, nil, "ok\n", 0},
		{"GET /healthz", stopping, 200, nil, "ok\n", 0},
		{"GET /readyz", alone, 200, nil, "ready\n", 0},
		{"GET /readyz", cutOff, 503, nil, "not ready: no sync with Redis yet\n", 0},
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
			if n := h.counter.status().n; n != tt.counted {
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
			status, ready int
			metrics       string
		}{
			{"before Redis", closed, 503, 503, "instance_requests_total 1, redis_up 0, "},
			{"Redis", carried, 200, 200, "instance_requests_total 2, cluster_requests 2, redis_up 1, "},
			{"Redis gone", closed, 503, 200, "instance_requests_total 3, cluster_requests 2, redis_up 0, "},
		} {
			n.set(step.fault)
			time.Sleep(3 * time.Second)
			status, _ := get("/")
			time.Sleep(time.Second)
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
		{"ADDR=:", `ADDR: malformed ":": want host:port or :port, such as :8083`},
		{"ADDR=:65536", `ADDR: unknown port "65536": want 0 to 65535`},
		{"ADDR=:http-or-so", `ADDR: unknown port "http-or-so": want 0 to 65535`},
		{"REDIS_KEY=a{b", `REDIS_KEY: brace in "a{b": want a key without braces`},
		{"REDIS_KEY=a}b", `REDIS_KEY: brace in "a}b": want a key without braces`},
		{"REDIS_TIMEOUT=1", `REDIS_TIMEOUT: "1": want a number with a unit, such as 500ms or 5s, and at least 20ms`},
		{"REDIS_TIMEOUT=19ms", `REDIS_TIMEOUT: "19ms": want a number with a unit, such as 500ms or 5s, and at least 20ms`},
		{"SHUTDOWN_DELAY=soon", `SHUTDOWN_DELAY: "soon": want a number with a unit, such as 500ms or 5s, and at least 0s`},
		{"SHUTDOWN_DELAY=-1s", `SHUTDOWN_DELAY: "-1s": want a number with a unit, such as 500ms or 5s, and at least 0s`},
		{"REDIS_URL=localhost:6379", "REDIS_URL: malformed URL: want redis://"},
		{"REDIS_URL=http://localhost", `REDIS_URL: unknown scheme "http": want redis or rediss`},
		{"REDIS_URL=ann:secret://localhost", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://", "REDIS_URL: missing host"},
		{"REDIS_URL=redis://:6379", "REDIS_URL: missing host"},
		{"REDIS_URL=redis://host:0", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://ann:65536", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://host:", "REDIS_URL: invalid port"},
		{"REDIS_URL=redis://::1", "REDIS_URL: invalid port: want 1 to 65535, and an IPv6 address in brackets"},
		{"REDIS_URL=redis://host/x", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://host/-1", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://ann@host", "REDIS_URL: user without a password"},
		{"REDIS_URL=redis://ann:secret@host/x", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://ann:1/secret@host", "REDIS_URL: invalid database"},
		{"REDIS_URL=redis://ann:secret@host:port", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://:%zzsecret@host", "REDIS_URL: malformed URL"},
		{"REDIS_URL=redis://:12#secret@host", "REDIS_URL: query or fragment"},
		{"REDIS_URL=redis://host?password=secret", "REDIS_URL: query or fragment"},
		{"REDIS_URL=redis://:secret", "REDIS_URL: malformed URL"},
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
	for name, value := range map[string]string{"ADDR": " :1\n", "REDIS_URL": "redis://host\n", "REDIS_KEY": "k\r", "REDIS_TIMEOUT": "2s\t", "SHUTDOWN_DELAY": " 3s "} {
		t.Setenv(name, value)
	}
	cfg, err := loadConfig()
	if err != nil || cfg.redis.addr != "host:6379" || cfg.redis.timeout != 2*time.Second {
		t.Fatalf("got %+v, %v", cfg.redis, err)
	}
	cfg.redis = nil
	if want = (config{addr: ":1", key: "k", redisTimeout: 2 * time.Second, shutdownDelay: 3 * time.Second}); cfg != want {
		t.Errorf("got %+v, want %+v", cfg, want)
	}
}

// A start that is refused ends with one line and a status.
func TestRefusedStarts(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tt := range []struct {
		env    string
		args   []string
		status int
		says   string
	}{
		{env: "REDIS_KEY={", status: 2, says: `requestcount: REDIS_KEY: brace in "{"`},
		{env: "ADDR=" + taken.Addr().String(), status: 1, says: "address already in use"},
		{args: []string{"healthcheck", "now"}, status: 2, says: `requestcount: unknown arguments "healthcheck now"`},
	} {
		cmd := command(t, []string{tt.env}, tt.args...)
		out, _ := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.Contains(string(out), tt.says) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("got status %d, %q; want %d, one line with %q", status, out, tt.status, tt.says)
		}
	}
}

func TestUsageAndVersion(t *testing.T) {
	t.Parallel()
	for arg, want := range map[string]string{"-h": usage, "-version": version + "\n"} {
		if out, err := command(t, nil, arg).Output(); err != nil || string(out) != want {
			t.Errorf("%s: got %v, %q; want %q", arg, err, out, want)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	ready, notReady := startProcess(t), startProcess(t, "REDIS_URL=redis://127.0.0.1:1")
	for _, tt := range []struct {
		addr   string
		status int
		says   string
	}{
		{ready.addr, 0, ""},
		{notReady.addr, 1, "requestcount: not ready: "},
		{"127.0.0.1:1", 1, "requestcount: dial tcp 127.0.0.1:1: "},
	} {
		check := command(t, []string{"ADDR=" + tt.addr}, "healthcheck")
		out, _ := check.CombinedOutput()
		if status := check.ProcessState.ExitCode(); status != tt.status || !strings.HasPrefix(string(out), tt.says) {
			t.Errorf("got status %d, %q; want %d, %q", status, out, tt.status, tt.says)
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
				if _, scanErr := fmt.Sscanf(body, strings.Replace(withTotal, ".", "", 1), &instance, &number, &total); err != nil || scanErr != nil {
					t.Errorf("got %q, %v, %v", body, err, scanErr)
					return
				}
				mu.Lock()
				numbers = append(numbers, number)
				mu.Unlock()
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	p.Process.Signal(syscall.SIGTERM)
	for ready := true; ready; {
		resp, _, err := get("GET", p.url+"/readyz")
		ready = err == nil && resp.StatusCode == http.StatusOK
	}
	wg.Wait()
	status, log := p.wait()
	if status != 0 || !strings.Contains(log, "msg=stop handled="+strconv.Itoa(len(numbers))+"\n") {
		t.Errorf("got status %d after %d answers\n%s", status, len(numbers), log)
	}
	oneTo(t, numbers)
	if got := n.total(); got != int64(len(numbers)) {
		t.Errorf("got the total %d, want %d", got, len(numbers))
	}
}

// Two signals within a second are one, and a later one ends the process at once.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		delay  string
		pause  time.Duration
		status int
	}{
		{delay: "500ms", pause: 200 * time.Millisecond, status: 0},
		{delay: "1h", pause: 1200 * time.Millisecond, status: -1}, // by the signal
	} {
		p := startProcess(t, "SHUTDOWN_DELAY="+tt.delay)
		p.Process.Signal(syscall.SIGTERM)
		time.Sleep(tt.pause)
		p.Process.Signal(syscall.SIGTERM)
		if status, log := p.wait(); status != tt.status || strings.Contains(log, "msg=stop ") != (status == 0) {
			t.Errorf("a second signal after %v: got status %d, want %d\n%s", tt.pause, status, tt.status, log)
		}
	}
}

// The log has the start, each change of Redis with its cause, the stop and what it waits for.
func TestLog(t *testing.T) {
	t.Parallel()
	m := miniredis.RunT(t)
	m.RequireAuth("secret")
	addr := m.Addr()
	m.Close()
	p := startProcess(t, "REDIS_URL=redis://:secret@"+addr, "REDIS_TIMEOUT=1s")
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
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
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
	want := []string{"start", "cannot count in Redis", "counting in Redis again", "told Redis what it lacked",
		"told Redis what it lacked", "stopping", "waiting until Redis and the other instances know what was counted here", "stop"}
	if code != 0 || !slices.Equal(got, want) {
		t.Errorf("got status %d, %q; want %q\n%s", code, got, want, log)
	}
	for _, part := range []string{" redis=" + addr, " go=go1.", " version=dev", ` cause="` + addr + ": ", " after=", " requests="} {
		if !strings.Contains(log, part) || strings.Contains(log, "secret") {
			t.Errorf("want %q, and no password, in the log:\n%s", part, log)
		}
	}
}

// Compose and the chart give their Redis user what the README says that the service needs.
func TestPermissionsAreTheSameEverywhere(t *testing.T) {
	t.Parallel()
	const permissions = "-@all +ping +auth +get +incrby +hget +hset +hgetall +eval +evalsha"
	plain := strings.NewReplacer("'", "", `"`, "", ",", "", "[", "", "]", "") // without YAML's signs
	for _, file := range []string{"docker-compose.yml", "helm/templates/redis-deployment.yaml", "README.md"} {
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

// The limits leave time: for a load balancer to close an idle connection first, for a request
// that waits for another one, and for the other instances to read what one has counted that ends.
func TestLimits(t *testing.T) {
	t.Parallel()
	s := newServer(nil, 20*time.Second)
	if s.IdleTimeout <= 600*time.Second || s.WriteTimeout <= 80*time.Second ||
		s.ReadTimeout+maxInterval*3/2 >= drainTimeout {
		t.Errorf("got %v for idle connections, %v for answers, %v for requests",
			s.IdleTimeout, s.WriteTimeout, s.ReadTimeout)
	}
}

// The longer the ledger, the longer the time between two syncs.
func TestInterval(t *testing.T) {
	for entries, want := range map[int]int64{0: 60, 1000: 40, 80_000: 20} {
		synctest.Test(t, func(t *testing.T) {
			var reads atomic.Int64
			c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
				if cmd[0] == "HGETALL" {
					reads.Add(1)
					return "*0\r\n"
				}
				return ":0\r\n"
			}).server(t, "redis://fake"))
			for i := range entries {
				c.ledger[strconv.Itoa(i)] = entry{}
			}
			start(t, c)
			time.Sleep(time.Minute - time.Millisecond)
			if got := reads.Load(); got != want {
				t.Errorf("with %d entries: got %d syncs in a minute, want %d", entries, got, want)
			}
		})
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
		if dials.Load() != 1 || len(c.ledger) != 1 {
			t.Errorf("got %d connections and %d entries, want one", dials.Load(), len(c.ledger))
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
					c.ledger[fmt.Sprint("host:2/", i)] = entry{1, 0}
				}
				start(t, c)
				time.Sleep(time.Millisecond)
				var mu sync.Mutex
				var wg sync.WaitGroup
				began := time.Now()
				fails, returns := time.Second, time.Second+tt.lasts
				known := fails + 2*tt.timeout + maxPause        // by then Redis is known to be down
				again := returns + retryInterval + tt.timeout/2 // by then it is known to be back
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
				time.Sleep(syncInterval)
			})
			if failed := len(numbers) - len(totals); failed > 0 != tt.fails {
				t.Errorf("got %d errors, want some: %t", failed, tt.fails)
			}
			if got, want := net.total(), tt.entries+int64(len(numbers)); got != want {
				t.Errorf("got the total %d, want %d", got, want)
			}
			oneTo(t, numbers)
			slices.Sort(totals)
			if n := len(slices.Compact(slices.Clone(totals))); n != len(totals) {
				t.Errorf("got %d different numbers of the cluster in %d answers", n, len(totals))
			}
		})
	}
}

// When Redis forgets, the number continues from the very next answer, whoever gives it, and the
// counts of instances that have ended or crashed stay. What others have counted since the last
// sync may be missing, and keeps nobody down.
func TestRedisForgets(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		var counters [4]*counter
		var crash [4]func()
		for i := range counters {
			c := newCounter(fmt.Sprint("host:", i), n.key, n.server(t))
			ctx, cancel := context.WithCancel(context.Background())
			go c.keepSynced(ctx)
			counters[i], crash[i] = c, cancel
			defer cancel()
		}
		for i := range 60 {
			counters[i%3].next()
		}
		const synced = syncInterval + 100*time.Millisecond // all have synced by then
		nothing := func() {}
		for _, step := range []struct {
			name   string
			before func()
			pause  time.Duration
			does   func()
			asked  int
			want   int64
		}{
			{"Redis forgets", nothing, synced, n.forget, 0, 61},
			{"an instance has crashed, and Redis forgets", crash[1], synced, n.forget, 0, 62},
			{"Redis forgets again", nothing, synced, n.forget, 2, 63},
			{"an instance has ended, and Redis forgets", func() { crash[0](); counters[0].end(t.Context()) }, synced, n.forget, 2, 64},
			{"one is asked that has never counted", nothing, synced, n.forget, 3, 65},
			{"another one is asked", nothing, synced, n.forget, 2, 66},
			{"at once, the one that has not read that", nothing, 0, n.forget, 3, 66},
			{"all have synced", nothing, synced, nothing, 3, 68},
			{"the total is deleted by hand", nothing, synced, func() { n.do([]string{"DEL", n.key}) }, 3, 1},
			{"and again, before a sync", nothing, synced, func() { n.do([]string{"DEL", n.key}); time.Sleep(synced) }, 2, 1},
		} {
			step.before()
			time.Sleep(step.pause)
			step.does()
			if _, got, err := counters[step.asked].next(); got != step.want || err != nil {
				t.Errorf("%s: got %d, %v; want %d", step.name, got, err, step.want)
			}
		}
		time.Sleep(2 * synced)
		if got := counters[3].status().total; got != 1 {
			t.Errorf("an instance knows the total %d, want 1", got)
		}
		closeAll(counters[1:]...)
	})
}

// Where the ledger cannot be read, requests are answered with their number as long as Redis has
// lost nothing; then in good time with an error. An instance that has never read it is not ready.
func TestLedgerCannotBeRead(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", n.key, n.server(t))
		start(t, c)
		for i, fault := range []string{unread, unread, closed, unread} {
			n.set(fault)
			time.Sleep(3 * time.Second)
			if _, got, err := c.next(); (err == nil) != (fault == unread) || i < 2 && got != int64(i+1) {
				t.Errorf("%s: got %d, %v", fault, got, err)
			}
		}
		if c.status().notReady == nil {
			t.Error("an instance that has not read the ledger is ready")
		}
		n.forget()
		var wg sync.WaitGroup
		for range connections {
			wg.Go(func() {
				began := time.Now()
				if _, got, err := c.next(); err == nil || time.Since(began) > 4*time.Second {
					t.Errorf("after a loss: got %d, %v after %v; want an error within 4 s", got, err, time.Since(began))
				}
			})
			time.Sleep(time.Millisecond)
		}
		wg.Wait()
	})
}

// A request does not wait for ever for a Redis that loses data again and again.
func TestBehindForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", "k", fakeRedis(func(cmd []string) string {
			switch {
			case cmd[0] == "HGETALL":
				return "*0\r\n"
			case len(cmd) > 6: // a batch
				return "-" + string(errBehind) + "\r\n"
			}
			return ":7\r\n"
		}).server(t, "redis://fake"))
		if _, got, err := c.next(); !errors.Is(err, errBehind) {
			t.Errorf("got %d, %v; want an error", got, err)
		}
		closeAll(c)
	})
}

// Where many requests find that Redis has forgotten, one sync does for all, also one under way.
func TestOneSyncForAll(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		c := newCounter("host:1", n.key, fakeRedis(func(cmd []string) string {
			if cmd[0] == "HGETALL" {
				reads.Add(1)
				time.Sleep(400 * time.Millisecond)
			}
			time.Sleep(10 * time.Millisecond)
			return n.answer(cmd)
		}).server(t, "redis://fake"))
		start(t, c) // its syncs take 0.4 s, and a second lies between them
		for asked, want := range map[time.Duration]int64{500: 1, 1600: 2, 2100: 3} {
			time.AfterFunc(asked*time.Millisecond, func() {
				n.forget()
				var wg sync.WaitGroup
				for range connections {
					wg.Go(func() {
						if _, _, err := c.next(); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				if got := reads.Load(); got != want {
					t.Errorf("asked after %d ms: got %d reads of the ledger, want %d", asked, got, want)
				}
			})
		}
		time.Sleep(3 * time.Second)
		if got := n.total(); got != 3*connections {
			t.Errorf("got the total %d, want %d", got, 3*connections)
		}
	})
}

// How long an instance takes to end, and what Redis then knows.
func TestEnd(t *testing.T) {
	const others = 1500 * time.Millisecond // until each has read the ledger
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
		{name: "a second after a request", asked: 3, idle: time.Second, took: others - time.Second, total: 3},
		{name: "idle", asked: 3, idle: 2 * time.Second, took: 0, total: 3},
		{name: "nothing was counted", took: 0},
		{name: "nothing was counted, Redis is away", fault: closed, lasts: time.Hour, took: 0},
		{name: "Redis forgets", asked: 3, forgets: 900 * time.Millisecond, took: time.Second + others, total: 3},
		{name: "idle, and Redis has forgotten", asked: 3, idle: 2 * time.Second, forgets: -1, took: others, total: 3},
		{name: "Redis is away", asked: 3, fault: closed, lasts: 3 * time.Second, took: 2500*time.Millisecond + others, total: 3},
		{name: "replies are lost", asked: 3, fault: lost, lasts: 3 * time.Second, late: 1,
			took: 2500*time.Millisecond + others, total: 4},
		{name: "counted while Redis is away", asked: 3, fault: closed, lasts: 3 * time.Second, late: 2,
			took: 3*time.Second + others, total: 5},
		{name: "a request under way", asked: 3, fault: silent, lasts: 400 * time.Millisecond, late: 1,
			took: 500*time.Millisecond + others, total: 4},
		{name: "the ledger cannot be read", asked: 3, fault: unread, lasts: 1400 * time.Millisecond, took: 3 * time.Second, total: 3},
		{name: "Redis is away for good", asked: 3, fault: closed, lasts: time.Hour, took: drainTimeout, total: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			synctest.Test(t, func(t *testing.T) {
				c := newCounter("host:1", n.key, n.server(t))
				c.syncOnce()
				for range tt.asked {
					c.next()
				}
				time.Sleep(tt.idle)
				if tt.lasts > 0 {
					n.set(tt.fault)
					time.AfterFunc(tt.lasts, func() { n.set(carried) })
				}
				if tt.forgets != 0 {
					time.AfterFunc(tt.forgets, n.forget)
				}
				for range tt.late {
					c.ask()
				}
				synctest.Wait()
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), drainTimeout)
				defer cancel()
				c.end(ctx)
				if took := time.Since(began); took < tt.took || took > tt.took+500*time.Millisecond {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
			if got := n.total(); got != tt.total {
				t.Errorf("got the total %d, want %d", got, tt.total)
			}
		})
	}
}

// A request whose reply is lost gets its own number when the command is repeated, whatever other
// requests, syncs and losses come between. If nobody has seen it counted, it gets the next one.
func TestLostReply(t *testing.T) {
	for _, tt := range []struct {
		between     string // steps of instance 1, which has lost the reply, and of another one
		want, known int64  // the number, and the highest that instance 1 knows then
	}{
		{"", 4, 4},
		{"1 asks, 1 syncs", 4, 5},
		{"2 syncs, Redis forgets, 2 asks", 4, 4},
		{"1 syncs, Redis forgets, 1 asks", 4, 5},
		{"Redis forgets, 2 asks", 5, 5},
	} {
		t.Run(tt.between, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			n.fault = held
			synctest.Test(t, func(t *testing.T) {
				steps := map[string]func(){"": func() {}, "Redis forgets": n.forget}
				var counters []*counter
				for i := range 3 {
					c := newCounter(fmt.Sprint("host:", i), n.key, n.server(t))
					counters = append(counters, c)
					steps[fmt.Sprint(i+1, " asks")] = func() { c.ask() }
					steps[fmt.Sprint(i+1, " syncs")] = func() { go c.syncOnce() }
				}
				for _, step := range []string{"1 asks", "2 asks", "3 asks", "1 syncs", "2 syncs"} {
					steps[step]()
					n.deliverAll()
				}
				r := counters[0].ask()
				n.deliver(0, true)
				repetition := n.take(0)
				for step := range strings.SplitSeq(tt.between, ", ") {
					steps[step]()
					n.deliverAll()
				}
				n.held = append(n.held, repetition)
				n.deliverAll()
				if known := counters[0].status().total; !r.told || r.total != tt.want || r.err != nil || known != tt.known {
					t.Errorf("got %+v and knows %d, want %d and %d", *r, known, tt.want, tt.known)
				}
				closeAll(counters...)
			})
		})
	}
}

// A sync does not go by what it has read first: Redis may have gone down since, or another instance
// may have given back what it lost.
func TestDuringSync(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	n.fault = held
	synctest.Test(t, func(t *testing.T) {
		one := newCounter("host:1", n.key, n.server(t))
		two := newCounter("host:2", n.key, (&network{key: n.key, do: n.do, fault: carried}).server(t))
		during := func(what func()) {
			go one.syncOnce()
			synctest.Wait()
			n.deliver(0, false) // the total
			what()
			n.deliverAll()
		}
		two.next()
		two.next()
		one.ask()
		n.deliverAll()
		during(func() {})
		give := func() { two.syncOnce() }
		for i, what := range []func(){func() {}, give, give} {
			two.syncOnce()
			n.forget()
			if during(what); one.status().total != int64(3+i) {
				t.Errorf("Redis has forgotten %d times: it knows the total %d, want %d", i+1, one.status().total, 3+i)
			}
			one.ask()
			n.deliverAll()
		}
		during(func() { one.setDown(errors.New("down")) })
		if one.status().down == nil {
			t.Error("Redis is said to be up")
		}
		closeAll(one, two)
	})
}

// A schedule is a random run of instances that share a Redis, over networks that lose, delay and
// reorder what they carry.
type schedule struct {
	*network // to the Redis, without faults
	t        *testing.T
	rng      *rand.Rand
	all      []*instance
	late     [][]string // commands still on their way, given up by their senders
	base     int64      // the total beside the sum of all counts
	losses   int        // how often Redis has lost something: numbers may come twice then
	failover func()     // to a replica that has what Redis held at some time

	mu     sync.Mutex
	told   map[int64]bool // numbers
	latest int64          // the highest of them
}

// An instance of a schedule.
type instance struct {
	*counter
	id    string // with which those of its connections begin
	way   *network
	state string // living, ending, ended or crashed

	asked, answered, numbered int64 // requests, those answered, and of these with the cluster's number
}

func (s *schedule) start() {
	way := &network{key: s.key, do: s.do, fault: held}
	server := way.server(s.t)
	server.timeout = 100 * time.Millisecond
	in := &instance{counter: newCounter("host:1", s.key, server), way: way, state: "living"}
	const few = 3 // so that requests wait for a connection
	in.pool = make(chan *conn, few)
	for len(in.spare) > few {
		in.id = strings.TrimRight((<-in.spare).id, "0123456789")
	}
	s.all = append(s.all, in)
}

func (s *schedule) state(in *instance) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return in.state
}

func (s *schedule) living() (living []*instance) {
	for _, in := range s.all {
		if s.state(in) == "living" {
			living = append(living, in)
		}
	}
	return living
}

// knows returns how many requests the instance knows of.
func (in *instance) knows() (n int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, e := range in.ledger {
		n += e.count
	}
	return n
}

// ask sends a request, whose number must be higher than what its instance had been told and knows
// the counts of and, as long as Redis has lost nothing, fit all others.
func (s *schedule) ask(in *instance) {
	in.asked++
	before, base := s.latest, s.base
	knew := min(in.status().total, base+in.knows())
	go func() {
		_, total, err := in.next()
		s.mu.Lock()
		defer s.mu.Unlock()
		if in.answered++; err != nil || in.state == "crashed" {
			return
		}
		if in.numbered++; s.losses == 0 && (total <= before || s.told[total]) {
			s.t.Errorf("got request %d to the cluster after %d was told", total, before)
		}
		if s.base == base && s.losses < 2 && total <= knew {
			s.t.Errorf("got request %d to the cluster of an instance that knew of %d", total, knew)
		}
		s.told[total], s.latest = true, max(s.latest, total)
	}()
}

// ledger returns what Redis holds: ids and values in turn, and the counts by id and in all.
func (s *schedule) ledger() (list []string, counts map[string]int64, sum int64) {
	got, err := readReply(replyReader(s.do([]string{"HGETALL", "{" + s.key + "}:ledger"})), '*')
	if err != nil {
		s.t.Fatal(err)
	}
	counts = map[string]int64{}
	for i := 0; i < len(got.list); i += 2 {
		count, _, _ := strings.Cut(got.list[i+1], " ")
		n, _ := strconv.ParseInt(count, 10, 64)
		counts[got.list[i]] = n
		sum += n
	}
	return got.list, counts, sum
}

// step does one thing at random, and checks that the total is the sum of the counts, and that no
// instance's falls while Redis has lost nothing.
func (s *schedule) step() {
	living := s.living()
	in := living[s.rng.IntN(len(living))]
	known := in.status().total
	way := s.all[s.rng.IntN(len(s.all))].way
	waiting := way.waiting()
	packet := s.rng.IntN(max(1, waiting))
	switch p := s.rng.IntN(100); {
	case p < 25:
		s.ask(in)
	case p < 35:
		go in.syncOnce()
	case p < 72 && waiting > 0:
		way.deliver(packet, false)
	case p < 78 && waiting > 0:
		way.deliver(packet, true)
	case p < 83 && waiting > 0:
		p := way.take(packet)
		s.late = append(s.late, p.cmd)
		p.answer <- closed
	case p < 86 && len(s.late) > 0:
		i := s.rng.IntN(len(s.late))
		s.do(s.late[i])
		s.late = slices.Delete(s.late, i, i+1)
	case p < 87:
		s.losses, s.base = s.losses+1, 0
		s.forget()
	case p < 88:
		list, _, _ := s.ledger()
		total, base := strconv.FormatInt(s.total(), 10), s.base
		s.failover = func() {
			s.losses, s.base = s.losses+1, base
			s.forget()
			s.do([]string{"SET", s.key, total})
			if len(list) > 0 {
				s.do(append([]string{"HSET", "{" + s.key + "}:ledger"}, list...))
			}
		}
	case p < 89 && s.failover != nil:
		s.failover()
	case p < 90:
		_, _, sum := s.ledger()
		s.losses, s.base = s.losses+1, -sum
		s.do([]string{"DEL", s.key})
	case p < 93 && len(living) < 4:
		s.start()
	case p < 95 && len(living) > 1:
		in.state = "ending"
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
			defer cancel()
			in.end(ctx)
			time.Sleep(time.Nanosecond) // until its requests have been answered
			s.mu.Lock()
			defer s.mu.Unlock()
			if in.state = "ended"; in.answered != in.asked {
				s.t.Errorf("an instance has ended with %d of %d requests answered", in.answered, in.asked)
			}
		}()
	case p < 96 && len(living) > 1:
		in.state = "crashed"
		s.late = append(s.late, in.way.cut()...)
	default:
		time.Sleep(time.Duration(s.rng.IntN(100)) * time.Millisecond)
	}
	synctest.Wait()
	if _, counts, sum := s.ledger(); s.base+sum != s.total() {
		s.t.Errorf("got the total %d, want %d and the counts %v", s.total(), s.base, counts)
	}
	if got := in.status().total; s.losses == 0 && got < known {
		s.t.Errorf("an instance knows the total %d, and knew %d", got, known)
	}
}

// settle lets everything arrive and all instances sync, and checks what is known then.
func (s *schedule) settle() {
	for _, in := range s.all {
		if s.state(in) != "crashed" {
			in.way.set(carried)
			in.way.deliverAll()
		}
	}
	time.Sleep(2 * drainTimeout)
	synctest.Wait()
	for _, cmd := range s.late {
		s.do(cmd)
	}
	for range 2 {
		for _, in := range s.living() {
			if err := in.syncOnce(); err != nil {
				s.t.Error(err)
			}
		}
	}
	synctest.Wait()
	_, counts, _ := s.ledger()
	var least, most int64
	for _, in := range s.all {
		most += in.asked
		if in.state == "crashed" {
			least += in.numbered
			continue
		}
		least += in.asked
		own := int64(0)
		for id, e := range in.counter.ledger {
			if strings.HasPrefix(id, in.id) {
				own += e.count
			}
			if in.state == "living" && counts[id] < e.count {
				s.t.Errorf("Redis has %d at %s, of which an instance knows %d", counts[id], id, e.count)
			}
		}
		if in.state == "ending" || own != in.asked || in.n != in.asked || in.answered != in.asked {
			s.t.Errorf("an instance that is %s has counted %d, knows %d and answered %d of %d requests",
				in.state, in.n, own, in.answered, in.asked)
		}
	}
	if n := s.total(); s.losses == 0 && (n < least || n > most) {
		s.t.Errorf("got the total %d, want %d to %d", n, least, most)
	}
}

// Whatever the network does, whoever ends or crashes, and whatever Redis forgets, the total is the
// sum of what is counted, no number is told twice while Redis keeps its data, and after a loss
// Redis has again all that any instance knows.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	schedules := uint64(250)
	if realRedis != "" {
		schedules = 1000 // a real Redis runs Lua ten times as fast
	}
	first := uint64(time.Now().UnixNano())
	if seed := os.Getenv("SEED"); seed != "" {
		first, _ = strconv.ParseUint(seed, 10, 64)
		schedules = 1
	}
	for part := range uint64(4) {
		t.Run(strconv.FormatUint(part, 10), func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			for seed := first + part; seed < first+schedules && !t.Failed(); seed += 4 {
				synctest.Test(t, func(t *testing.T) { runSchedule(t, n, seed) })
				n.forget()
			}
		})
	}
}

func runSchedule(t *testing.T, n *network, seed uint64) {
	s := &schedule{network: n, t: t, rng: rand.New(rand.NewPCG(seed, 0)), told: map[int64]bool{}}
	s.start()
	for range 40 + s.rng.IntN(80) {
		s.step()
	}
	s.settle()
	for _, in := range s.all {
		in.way.cut()
	}
	time.Sleep(time.Minute)
	for _, in := range s.all {
		closeAll(in.counter)
	}
	if t.Failed() {
		t.Errorf("to repeat this: SEED=%d go test -run TestRandomSchedules/0", seed)
	}
}
