package main

import (
	"bufio"
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
	"reflect"
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

// startRedis returns the URL of a Redis: a miniredis of the test's own, or the
// server at REDIS_URL, which all tests then share under keys of their own.
func startRedis(t *testing.T) string {
	if realRedis != "" {
		return realRedis
	}
	return "redis://" + miniredis.RunT(t).Addr()
}

func mustParse(t *testing.T, url string, timeout time.Duration) *redisServer {
	t.Helper()
	s, err := parseRedisURL(url, timeout)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dialRedis returns a function that has the Redis at url carry out a command, and returns the
// reply as it is.
func dialRedis(t *testing.T, url string) func(cmd []string) string {
	c := newConn(mustParse(t, url, 5*time.Second), "", "")
	if err := c.dial(c.server.addr, time.Now().Add(5*time.Second)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	c.nc.SetDeadline(time.Time{})
	var mu sync.Mutex
	return func(cmd []string) string {
		mu.Lock()
		defer mu.Unlock()
		if _, err := c.nc.Write(appendCommand(nil, cmd...)); err != nil {
			return closed
		}
		reply, err := readRaw(c.r)
		if err != nil {
			return closed
		}
		return reply
	}
}

// readRaw reads a whole reply as it is.
func readRaw(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
	switch line[0] {
	case '$':
		if n >= 0 {
			rest := make([]byte, n+2)
			_, err = io.ReadFull(r, rest)
			line += string(rest)
		}
	case '*':
		for ; n > 0 && err == nil; n-- {
			var part string
			part, err = readRaw(r)
			line += part
		}
	}
	return line, err
}

// redisTotal returns the total at key.
func redisTotal(t *testing.T, url, key string) int64 {
	t.Helper()
	return totalOf(t, dialRedis(t, url), key)
}

func totalOf(t *testing.T, do func(cmd []string) string, key string) int64 {
	t.Helper()
	n, err := readReply(replyReader(do([]string{"INCRBY", key, "0"})), ':')
	if err != nil {
		t.Fatal(err)
	}
	return n.n
}

// forget makes Redis forget what it knows of key, as a restart would.
func forget(key string) []string { return []string{"DEL", key, "{" + key + "}:ledger"} }

// newKey returns a key that no other test uses, deleted at the end.
func newKey(t *testing.T, url string) string {
	key := "test:" + crand.Text()
	do := dialRedis(t, url)
	t.Cleanup(func() { do(forget(key)) })
	return key
}

// start runs c until the end of the test.
func start(t *testing.T, c *counter) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		closeAll(c)
	})
}

// closeAll closes the TCP connections of c, none of which may be in use.
func closeAll(c *counter) {
	for range len(c.pool) {
		conn := <-c.pool
		conn.close()
		c.pool <- conn
	}
}

// syncOnce syncs over a connection of the pool.
func (c *counter) syncOnce() error {
	conn := c.take()
	defer func() { c.pool <- conn }()
	return c.sync(conn)
}

// newInstance returns an instance in this process, and its handler.
func newInstance(t *testing.T, instance, key string, redis *redisServer) (*httptest.Server, *handler) {
	c := newCounter(instance, key, redis)
	start(t, c)
	h := &handler{counter: c, instance: instance}
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

func get(t *testing.T, method, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// An answer is what a request to / was told.
type answer struct {
	status   int
	instance string
	n        int64 // to this instance
	total    int64 // to the cluster; 0 with a 503
}

// ask sends a request and reads its answer, which must have the promised form.
func ask(url string) (a answer, err error) {
	resp, err := http.Get(url)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil { // not to be taken for a connection that was refused
		return a, fmt.Errorf("%s: answer cut off: %v", resp.Status, err)
	}
	a.status = resp.StatusCode
	form, parts := countedText, []any{&a.instance, &a.n, &a.total}
	if a.status == http.StatusServiceUnavailable {
		form, parts = uncountedText, parts[:2]
	}
	// %s reads up to a space, so the full stop behind it comes along.
	_, err = fmt.Sscanf(string(body), strings.Replace(form, "%s.", "%s", 1), parts...)
	a.instance = strings.TrimSuffix(a.instance, ".")
	if err != nil {
		return a, fmt.Errorf("%s: not the promised answer: %q", resp.Status, body)
	}
	return a, nil
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

func TestTwoInstancesOneRedis(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	one, _ := newInstance(t, "host1:8083", key, mustParse(t, url, 5*time.Second))
	two, _ := newInstance(t, "host2:8083", key, mustParse(t, url, 5*time.Second))
	for _, step := range []struct{ url, want string }{
		{two.URL, "You are talking to instance host2:8083.\nThis is request 1 to this instance and request 1 to the cluster.\n"},
		{one.URL, "You are talking to instance host1:8083.\nThis is request 1 to this instance and request 2 to the cluster.\n"},
		{two.URL, "You are talking to instance host2:8083.\nThis is request 2 to this instance and request 3 to the cluster.\n"},
	} {
		if _, body := get(t, "GET", step.url); body != step.want {
			t.Errorf("got %q, want %q", body, step.want)
		}
	}
}

// refusing is a Redis that is not there.
func refusing(t *testing.T) *redisServer {
	s := fakeRedis(func([]string) string { return closed }).server(t, "redis://fake")
	s.timeout = 10 * time.Millisecond
	return s
}

// Every row of the README's table of paths.
func TestPaths(t *testing.T) {
	t.Parallel()
	const first, plain = "You are talking to instance host:1.\n", "text/plain; charset=utf-8"
	alone := func(t *testing.T) (*httptest.Server, *handler) { return newInstance(t, "host:1", "k", nil) }
	cutOff := func(t *testing.T) (*httptest.Server, *handler) {
		h := &handler{counter: newCounter("host:1", "k", refusing(t)), instance: "host:1"}
		s := httptest.NewServer(h.routes())
		t.Cleanup(s.Close)
		return s, h
	}
	stopping := func(t *testing.T) (*httptest.Server, *handler) {
		s, h := alone(t)
		h.stopping.Store(true)
		return s, h
	}
	for _, tt := range []struct {
		name, request string
		server        func(*testing.T) (*httptest.Server, *handler)
		status        int
		header        map[string]string
		body          string // with a trailing … it is only the beginning
		counted       int64
	}{
		{"counted", "GET /", alone, 200, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "101"},
			first + "This is request 1 to this instance and request 1 to the cluster.\n", 1},
		{"counted with a query", "GET /?a=b", alone, 200, nil, first + "This is request 1 to this instance and request 1 to the cluster.\n", 1},
		{"HEAD", "HEAD /", alone, 200, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "101"}, "", 1},
		{"no Redis", "GET /", cutOff, 503, map[string]string{"Content-Type": plain, "Cache-Control": "no-store", "Content-Length": "106", "Retry-After": "1"},
			first + "This is request 1 to this instance; the cluster count is unavailable.\n", 1},
		{"HEAD without Redis", "HEAD /", cutOff, 503, map[string]string{"Retry-After": "1"}, "", 1},
		{"POST", "POST /", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"DELETE", "DELETE /", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"POST elsewhere", "POST /healthz", alone, 405, map[string]string{"Allow": "GET, HEAD"}, "…", 0},
		{"favicon", "GET /favicon.ico", alone, 404, nil, "…", 0},
		{"healthz", "GET /healthz", cutOff, 200, nil, "ok\n", 0},
		{"healthz while stopping", "GET /healthz", stopping, 200, nil, "ok\n", 0},
		{"readyz", "GET /readyz", alone, 200, nil, "ready\n", 0},
		{"readyz before Redis", "GET /readyz", cutOff, 503, nil, "not ready: no answer from Redis yet\n", 0},
		{"readyz while stopping", "GET /readyz", stopping, 503, nil, "not ready: stopping\n", 0},
		{"counted while stopping", "GET /", stopping, 200, map[string]string{"Connection": "close"}, first + "…", 1},
		{"metrics", "GET /metrics", alone, 200, map[string]string{"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}, "# HELP requestcount_instance_requests_total …", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, h := tt.server(t)
			method, path, _ := strings.Cut(tt.request, " ")
			resp, body := get(t, method, s.URL+path)
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
	url := startRedis(t)
	key := newKey(t, url)
	n := &network{do: dialRedis(t, url)}
	synctest.Test(t, func(t *testing.T) {
		h := &handler{counter: newCounter("host:1", key, n.server(t, "redis://fake")), instance: "host:1"}
		start(t, h.counter)
		get := func(path string) (int, string) {
			w := httptest.NewRecorder()
			h.routes().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
			return w.Code, w.Body.String()
		}
		for _, step := range []struct {
			name          string
			fault         string
			status, ready int
			metrics       string
		}{
			{"before Redis", closed, 503, 503, "requests_total 1, redis_up 0"},
			{"Redis", "", 200, 200, "requests_total 2, cluster_requests 2, redis_up 1"},
			{"Redis gone", closed, 503, 200, "requests_total 3, cluster_requests 2, redis_up 0"},
		} {
			if n.fault.Store(nil); step.fault != "" {
				n.fault.Store(&step.fault)
			}
			time.Sleep(3 * time.Second)
			status, _ := get("/")
			time.Sleep(time.Second)
			ready, _ := get("/readyz")
			if status != step.status || ready != step.ready {
				t.Errorf("%s: got %d and %d, want %d and %d", step.name, status, ready, step.status, step.ready)
			}
			_, page := get("/metrics")
			var got []string
			for _, m := range regexp.MustCompile(`(?m)^requestcount_(?:instance_)?(\S+ \d+)$`).FindAllStringSubmatch(page, -1) {
				got = append(got, m[1])
				name, _, _ := strings.Cut(m[0], " ")
				if !strings.Contains(page, "# HELP "+name+" ") || !strings.Contains(page, "# TYPE "+name+" ") {
					t.Errorf("%s: no HELP and TYPE of %s in\n%s", step.name, name, page)
				}
			}
			if got := strings.Join(got, ", "); got != step.metrics {
				t.Errorf("%s: got the metrics %s, want %s", step.name, got, step.metrics)
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
		{"REDIS_TIMEOUT=1", `REDIS_TIMEOUT: "1": want a number with a unit, such as 500ms or 5s, and at least 1ms`},
		{"REDIS_TIMEOUT=0s", `REDIS_TIMEOUT: "0s": want a number with a unit, such as 500ms or 5s, and at least 1ms`},
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
	for _, tt := range []struct {
		env    string
		status int
		says   string
	}{
		{"", 0, ""},
		{"REDIS_URL=redis://127.0.0.1:1", 1, "requestcount: not ready: "},
	} {
		p := startProcess(t, tt.env, "REDIS_TIMEOUT=100ms")
		check := command(t, []string{"ADDR=" + p.addr}, "healthcheck")
		out, _ := check.CombinedOutput()
		if status := check.ProcessState.ExitCode(); status != tt.status || !strings.HasPrefix(string(out), tt.says) {
			t.Errorf("%s: got status %d, %q; want %d, %q", tt.env, status, out, tt.status, tt.says)
		}
	}
	none := command(t, []string{"ADDR=127.0.0.1:1"}, "healthcheck")
	if out, _ := none.CombinedOutput(); none.ProcessState.ExitCode() != 1 {
		t.Errorf("without a server: got status %d, %q; want 1", none.ProcessState.ExitCode(), out)
	}
}

// SIGTERM under load: each request that the server took up is answered and counted.
func TestTerminateUnderLoad(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	p := startProcess(t, "REDIS_URL="+url, "REDIS_KEY="+key, "REDIS_TIMEOUT=5s", "SHUTDOWN_DELAY=500ms")
	var mu sync.Mutex
	var numbers []int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for {
				a, err := ask(p.url)
				if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
					return // the listener has closed
				}
				if err != nil || a.status != 200 {
					t.Errorf("%+v, %v", a, err)
					return
				}
				mu.Lock()
				numbers = append(numbers, a.n)
				mu.Unlock()
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	p.Process.Signal(syscall.SIGTERM)
	for ready := true; ready; {
		resp, _ := get(t, "GET", p.url+"/readyz")
		ready = resp.StatusCode == http.StatusOK
	}
	wg.Wait()
	status, log := p.wait()
	if status != 0 || !strings.Contains(log, "msg=stop handled="+strconv.Itoa(len(numbers))+"\n") {
		t.Errorf("got status %d after %d answers\n%s", status, len(numbers), log)
	}
	oneTo(t, "the instance", numbers)
	if n := redisTotal(t, url, key); n != int64(len(numbers)) {
		t.Errorf("got the total %d, want %d", n, len(numbers))
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
		{delay: "100ms", pause: 0, status: 0},
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
		resp, _ := get(t, "GET", p.url)
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
		"told Redis what it lacked", "stopping", "waiting until the other instances know what was counted here", "stop"}
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
	c := newCounter("host:1", "k", refusing(t))
	for entries, want := range map[int]time.Duration{0: time.Second, 1000: 1500 * time.Millisecond, 80_000: 3 * time.Second} {
		for i := range entries {
			c.ledger[strconv.Itoa(i)] = entry{}
		}
		if got := c.interval(); len(c.ledger) == entries && got != want {
			t.Errorf("with %d entries: got an interval of %v, want %v", entries, got, want)
		}
		clear(c.ledger)
	}
}

// A request does not wait for the round trip of another, up to eight at a time;
// those beyond share the next command.
func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var commands atomic.Int64
		f := fakeRedis(func(cmd []string) string {
			if cmd[0] == "DIAL" {
				return "+OK"
			}
			n := commands.Add(1)
			time.Sleep(100 * time.Millisecond)
			return fmt.Sprintf(":%d\r\n", 10*n)
		})
		c := newCounter("host:1", "k", f.server(t, "redis://fake"))
		type told struct {
			n, total int64
			took     time.Duration
		}
		var mu sync.Mutex
		var got []told
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 10 * time.Millisecond)
				began := time.Now()
				n, total, err := c.next()
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				got = append(got, told{n, total, time.Since(began)})
				mu.Unlock()
			})
		}
		wg.Wait()
		closeAll(c)
		var want []told
		for i := range int64(8) {
			want = append(want, told{i + 1, 10 * (i + 1), 100 * time.Millisecond})
		}
		// The ninth comes after 80 ms and waits until the first connection is free, after 100.
		want = append(want, told{9, 89, 120 * time.Millisecond}, told{10, 90, 110 * time.Millisecond})
		slices.SortFunc(got, func(a, b told) int { return int(a.n - b.n) })
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// An instance that is asked by hand has one connection.
func TestOneConnectionWhereOneDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		c := newCounter("host:1", "k", fakeRedis(s.answer).server(t, "redis://fake"))
		for range 20 {
			c.next()
		}
		if closeAll(c); len(s.gotDials) != 1 || len(c.ledger) != 1 {
			t.Errorf("got %d connections and %d entries, want one", len(s.gotDials), len(c.ledger))
		}
	})
}

const lost = "lost" // the command is carried out, and then the connection closed

// A network is the way to a Redis, with faults.
type network struct {
	do    func(cmd []string) string // the Redis
	fault atomic.Pointer[string]    // what comes of all commands and dials; nil for none
}

func (n *network) server(t *testing.T, url string) *redisServer {
	return fakeRedis(func(cmd []string) string {
		fault := n.fault.Load()
		switch {
		case fault != nil && *fault != lost:
			return *fault
		case cmd[0] == "DIAL" || cmd[0] == "AUTH":
			return "+OK\r\n"
		}
		answer := n.do(cmd)
		if fault != nil {
			return closed
		}
		return answer
	}).server(t, url)
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
			url := startRedis(t)
			key := newKey(t, url)
			n := &network{do: dialRedis(t, url)}
			var numbers, totals []int64
			synctest.Test(t, func(t *testing.T) {
				s := n.server(t, tt.url)
				s.timeout = tt.timeout
				c := newCounter("host:1", key, s)
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
				for time.Since(began) < again+time.Second {
					switch time.Since(began) {
					case fails:
						n.fault.Store(&tt.fault)
					case returns:
						n.fault.Store(nil)
					}
					wg.Go(ask)
					time.Sleep(25 * time.Millisecond)
				}
				wg.Wait()
				time.Sleep(syncInterval)
			})
			if failed := len(numbers) - len(totals); failed > 0 != tt.fails {
				t.Errorf("got %d errors, want some: %t", failed, tt.fails)
			}
			if got, want := redisTotal(t, url, key), tt.entries+int64(len(numbers)); got != want {
				t.Errorf("got the total %d, want %d", got, want)
			}
			oneTo(t, "the instance", numbers)
			slices.Sort(totals)
			if n := len(slices.Compact(slices.Clone(totals))); n != len(totals) {
				t.Errorf("got %d different numbers of the cluster in %d answers", n, len(totals))
			}
		})
	}
}

// When Redis forgets, the number continues from the very next answer, whoever gives it, and the
// counts of instances that have ended or crashed stay.
func TestRedisForgets(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	n := &network{do: dialRedis(t, url)}
	synctest.Test(t, func(t *testing.T) {
		var counters [4]*counter
		var crash [4]func()
		for i := range counters {
			c := newCounter(fmt.Sprint("host:", i), key, n.server(t, "redis://fake"))
			ctx, cancel := context.WithCancel(context.Background())
			go c.run(ctx)
			counters[i], crash[i] = c, cancel
			defer closeAll(c)
			defer cancel()
		}
		for i := range 60 {
			counters[i%3].next()
		}
		time.Sleep(time.Second)
		for _, step := range []struct {
			name  string
			does  func()
			asked int
			want  int64
		}{
			{"Redis forgets", func() {}, 0, 61},
			{"an instance crashes", crash[1], 0, 62},
			{"nothing more", func() {}, 2, 63},
			{"an instance ends", func() { crash[0](); counters[0].end(t.Context()) }, 2, 64},
			{"one is asked that has never counted", func() {}, 3, 65},
			{"another one is asked", func() {}, 2, 66},
		} {
			step.does()
			time.Sleep(time.Second)
			n.do(forget(key))
			if _, got, err := counters[step.asked].next(); got != step.want || err != nil {
				t.Errorf("%s: got %d, %v; want %d", step.name, got, err, step.want)
			}
		}
	})
}

// What others have counted since the last sync may be missing after a loss, and keeps nobody down.
func TestLastSecondIsLost(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	n := &network{do: dialRedis(t, url)}
	synctest.Test(t, func(t *testing.T) {
		one := newCounter("host:1", key, n.server(t, "redis://fake"))
		two := newCounter("host:2", key, n.server(t, "redis://fake"))
		for _, c := range []*counter{one, two, two, one} {
			c.next()
		}
		n.do(forget(key))
		if _, got, err := one.next(); got != 3 || err != nil {
			t.Errorf("got %d, %v; want 3, with its own two", got, err)
		}
		two.syncOnce()
		if _, got, err := one.next(); got != 6 || err != nil {
			t.Errorf("got %d, %v; want 6", got, err)
		}
		closeAll(one)
		closeAll(two)
	})
}

// Where the ledger cannot be read, requests are answered with their number as long as Redis has
// lost nothing; then in good time with an error. An instance that has never read it is not ready.
func TestLedgerCannotBeRead(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	do := dialRedis(t, url)
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", key, (&network{do: func(cmd []string) string {
			if cmd[0] == "HGETALL" {
				return silent
			}
			return do(cmd)
		}}).server(t, "redis://fake"))
		start(t, c)
		for want := range int64(3) {
			time.Sleep(time.Second)
			if _, got, err := c.next(); got != want+1 || err != nil {
				t.Errorf("got %d, %v; want %d", got, err, want+1)
			}
		}
		if c.status().notReady == nil {
			t.Error("an instance that has not read the ledger is ready")
		}
		do(forget(key))
		began := time.Now()
		if _, got, err := c.next(); err == nil || time.Since(began) > 4*time.Second {
			t.Errorf("after a loss: got %d, %v after %v; want an error within 4 s", got, err, time.Since(began))
		}
	})
}

// Where many requests find that Redis has forgotten, one sync does for all.
func TestOneSyncForAll(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	do := dialRedis(t, url)
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		c := newCounter("host:1", key, (&network{do: func(cmd []string) string {
			if cmd[0] == "HGETALL" {
				reads.Add(1)
				time.Sleep(400 * time.Millisecond)
			}
			time.Sleep(10 * time.Millisecond)
			return do(cmd)
		}}).server(t, "redis://fake"))
		var wg sync.WaitGroup
		askAll := func() {
			for range connections {
				wg.Go(func() {
					if _, _, err := c.next(); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(time.Millisecond)
			}
			wg.Wait()
		}
		askAll()
		do(forget(key))
		askAll()
		if closeAll(c); reads.Load() != 1 {
			t.Errorf("got %d reads of the ledger, want 1", reads.Load())
		}
	})
	if got := redisTotal(t, url, key); got != 2*connections {
		t.Errorf("got the total %d, want %d", got, 2*connections)
	}
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
		{name: "Redis is away for good", asked: 3, fault: closed, lasts: time.Hour, took: drainTimeout, total: 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url := startRedis(t)
			key := newKey(t, url)
			n := &network{do: dialRedis(t, url)}
			synctest.Test(t, func(t *testing.T) {
				c := newCounter("host:1", key, n.server(t, "redis://fake"))
				c.syncOnce()
				for range tt.asked {
					c.next()
				}
				time.Sleep(tt.idle)
				if tt.fault != "" || tt.lasts > 0 {
					n.fault.Store(&tt.fault)
					time.AfterFunc(tt.lasts, func() { n.fault.Store(nil) })
				}
				if tt.forgets != 0 {
					time.AfterFunc(tt.forgets, func() { n.do(forget(key)) })
				}
				for range tt.late {
					go c.next()
				}
				synctest.Wait()
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), drainTimeout)
				defer cancel()
				c.end(ctx)
				closeAll(c)
				if took := time.Since(began); took < tt.took || took > tt.took+500*time.Millisecond {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
			if got := redisTotal(t, url, key); got != tt.total {
				t.Errorf("got the total %d, want %d", got, tt.total)
			}
		})
	}
}

// A wire carries commands to a Redis, each only when told to.
type wire struct {
	do func(cmd []string) string // the Redis

	mu   sync.Mutex
	sent []*packet // on their way
	cut  bool      // nothing is carried any more
	free bool      // everything is carried at once
}

type packet struct {
	cmd    []string
	answer chan string
}

// newWire returns a wire to a Redis, and a key there. It is called outside of bubbles.
func newWire(t *testing.T) (*wire, string) {
	url := startRedis(t)
	return &wire{do: dialRedis(t, url)}, newKey(t, url)
}

func (w *wire) server(t *testing.T) *redisServer {
	return fakeRedis(func(cmd []string) string {
		w.mu.Lock()
		defer w.mu.Unlock()
		switch {
		case w.cut:
			return closed
		case cmd[0] == "DIAL":
			return "+OK"
		case w.free:
			return w.do(cmd)
		}
		p := &packet{cmd, make(chan string)}
		w.sent = append(w.sent, p)
		w.mu.Unlock()
		defer w.mu.Lock()
		return <-p.answer
	}).server(t, "redis://fake")
}

// waiting returns how many packets are on their way.
func (w *wire) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sent)
}

// take takes packet i from the wire.
func (w *wire) take(i int) *packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.sent[i]
	w.sent = slices.Delete(w.sent, i, i+1)
	return p
}

// deliver has Redis carry out packet i, whose reply comes or is lost with the connection.
func (w *wire) deliver(i int, lost bool) {
	p := w.take(i)
	answer := w.do(p.cmd)
	if lost {
		answer = closed
	}
	p.answer <- answer
	synctest.Wait()
}

// deliverAll delivers all packets, and those that follow.
func (w *wire) deliverAll() {
	for synctest.Wait(); w.waiting() > 0; {
		w.deliver(0, false)
	}
}

// open lets everything through.
func (w *wire) open() {
	w.mu.Lock()
	w.free = true
	w.mu.Unlock()
	w.deliverAll()
}

// close loses all packets, also those to come, and returns their commands.
func (w *wire) close() (lost [][]string) {
	w.mu.Lock()
	w.cut = true
	w.mu.Unlock()
	for synctest.Wait(); w.waiting() > 0; synctest.Wait() {
		p := w.take(0)
		lost = append(lost, p.cmd)
		p.answer <- closed
	}
	return lost
}

// A request is what a call of next was told, once it was.
type request struct {
	n, total int64
	err      error
	told     bool
}

// ask sends a request; its command is on the wire then.
func (c *counter) ask() *request {
	r := &request{}
	go func() {
		r.n, r.total, r.err = c.next()
		r.told = true
	}()
	synctest.Wait()
	return r
}

// A request whose reply is lost gets its own number when the command is repeated, whatever other
// requests, syncs and losses come between. If nobody has seen it counted, it gets the next one.
func TestLostReply(t *testing.T) {
	type cluster struct {
		*wire
		one, two *counter // the first has lost the reply
		key      string
	}
	sync := func(cl cluster, c *counter) {
		go c.syncOnce()
		cl.deliverAll()
	}
	forgetAndAsk := func(cl cluster, c *counter) {
		cl.do(forget(cl.key))
		c.ask()
		cl.deliverAll()
	}
	for _, tt := range []struct {
		name        string
		want, known int64 // the number, and the highest that the instance knows then
		between     func(cl cluster)
	}{
		{"nothing else", 4, 4, func(cl cluster) {}},
		{"another request and a sync", 4, 5, func(cl cluster) {
			cl.one.ask()
			cl.deliverAll()
			sync(cl, cl.one)
		}},
		{"Redis forgets, and another instance that has seen it puts it back", 4, 4, func(cl cluster) {
			sync(cl, cl.two)
			forgetAndAsk(cl, cl.two)
		}},
		{"Redis forgets, and the instance itself puts it back", 4, 5, func(cl cluster) {
			sync(cl, cl.one)
			forgetAndAsk(cl, cl.one)
		}},
		{"Redis forgets, and nobody has seen it", 5, 5, func(cl cluster) { forgetAndAsk(cl, cl.two) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var cl cluster
			cl.wire, cl.key = newWire(t)
			synctest.Test(t, func(t *testing.T) {
				var counters []*counter
				for i := range 3 {
					c := newCounter(fmt.Sprint("host:", i), cl.key, cl.server(t))
					c.ask()
					cl.deliverAll()
					counters = append(counters, c)
				}
				for _, c := range counters {
					sync(cl, c)
				}
				cl.one, cl.two = counters[0], counters[1]
				r := cl.one.ask()
				cl.deliver(0, true)
				repetition := cl.take(0)
				tt.between(cl)
				cl.sent = append(cl.sent, repetition)
				cl.deliverAll()
				if known := cl.one.status().total; !r.told || r.total != tt.want || r.err != nil || known != tt.known {
					t.Errorf("got %+v and knows %d, want %d and %d", *r, known, tt.want, tt.known)
				}
				cl.close()
				for _, c := range counters {
					closeAll(c)
				}
			})
		})
	}
}

// An instance that syncs as Redis loses its data knows as much as before.
func TestLossDuringSync(t *testing.T) {
	for _, tt := range []struct {
		name     string
		read     int  // commands of the sync that come before the loss
		restored bool // by another instance, before the sync goes on
	}{
		{"before it, and another one restores", 0, true},
		{"before it has read the ledger", 1, false},
		{"before it has read the ledger, and another one restores", 1, true},
		{"after it has read the ledger", 2, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w, key := newWire(t)
			synctest.Test(t, func(t *testing.T) {
				one := newCounter("host:1", key, w.server(t))
				two := newCounter("host:2", key, (&network{do: w.do}).server(t, "redis://fake"))
				two.next()
				one.ask()
				w.deliverAll()
				go one.syncOnce()
				w.deliverAll()
				two.syncOnce()

				go one.syncOnce()
				synctest.Wait()
				for range tt.read {
					w.deliver(0, false)
				}
				w.do(forget(key))
				if tt.restored {
					if w.waiting() > 0 && tt.read == 0 {
						w.deliver(0, false)
					}
					two.syncOnce()
				}
				w.deliverAll()
				r := one.ask()
				w.deliverAll()
				if r.total != 3 || r.err != nil {
					t.Errorf("got %+v, want 3", *r)
				}
				closeAll(one)
				closeAll(two)
			})
		})
	}
}

// A sync that is slow does not take back what has been told meanwhile.
func TestTotalIsTheLatest(t *testing.T) {
	t.Parallel()
	w, key := newWire(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", key, w.server(t))
		c.ask()
		w.deliverAll()
		go c.syncOnce()
		synctest.Wait()
		w.deliver(0, false) // the total
		c.ask()
		w.deliver(1, false)
		w.deliverAll()
		if got := c.status().total; got != 2 {
			t.Errorf("it knows %d, want 2", got)
		}
		closeAll(c)
	})
}

// What was counted while Redis was down is told before any other number.
func TestCountedWhileDown(t *testing.T) {
	t.Parallel()
	w, key := newWire(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", key, w.server(t))
		go c.syncOnce() // Redis knows the script then
		w.deliverAll()
		c.note(errors.New("down"))
		for range 5 {
			c.next()
		}
		go c.syncOnce()
		synctest.Wait()
		w.deliver(0, false) // the total
		if r := c.ask(); !r.told || r.n != 6 || r.err == nil {
			t.Errorf("before Redis was told: got %+v, want 6 and an error", *r)
		}
		w.deliverAll()
		go c.syncOnce()
		w.deliverAll()
		r := c.ask()
		w.deliverAll()
		if r.n != 7 || r.total != 7 || r.err != nil {
			t.Errorf("got %+v, want 7 and 7", *r)
		}
		closeAll(c)
	})
}

// An instance does not end before the requests that it has begun.
func TestEndWaitsForRequests(t *testing.T) {
	t.Parallel()
	w, key := newWire(t)
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", key, w.server(t))
		c.ask()
		w.deliverAll()
		time.Sleep(2 * time.Second)
		r := c.ask()
		ended := make(chan bool, 1)
		go func() {
			c.end(t.Context())
			ended <- r.told
		}()
		synctest.Wait()
		command := w.take(0)
		w.deliverAll()
		command.answer <- w.do(command.cmd)
		w.open()
		if !<-ended || r.total != 2 {
			t.Errorf("it has ended with the request at %+v", *r)
		}
		closeAll(c)
	})
}

// A schedule is a random run of instances that share a Redis, over wires that lose, delay and
// reorder what they carry.
type schedule struct {
	t    *testing.T
	rng  *rand.Rand
	do   func(cmd []string) string // the Redis
	key  string
	all  []*instance
	late [][]string // commands still on their way, given up by their senders
	base int64      // the total beside the sum of all counts
	lost int        // how often Redis has lost something: numbers may come twice then
	copy *copied    // of what Redis held at some time

	mu     sync.Mutex
	told   map[int64]bool // numbers
	latest int64          // the highest of them
}

type copied struct {
	total, base int64
	ledger      []string // ids and values in turn
}

// An instance of a schedule.
type instance struct {
	c             *counter
	w             *wire
	state         string // living, ending, ended or crashed
	asked         int64
	answered, own int64 // those answered, with the cluster's number and all
}

func (s *schedule) start() {
	w := &wire{do: s.do}
	server := w.server(s.t)
	server.timeout = 100 * time.Millisecond
	c := newCounter("host:1", s.key, server)
	const few = 3 // so that requests wait for a connection
	spare := c.spare
	c.pool, c.spare = make(chan *conn, few), make(chan *conn, few)
	for range few {
		c.spare <- <-spare
	}
	s.all = append(s.all, &instance{c: c, w: w, state: "living"})
}

func (s *schedule) set(in *instance, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in.state = state
}

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

// knows returns how many requests the instance knows of.
func (in *instance) knows() (n int64) {
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	for _, e := range in.c.ledger {
		n += e.count
	}
	return n
}

// ask sends a request, whose number must be higher than what its instance had been told and knows
// the counts of and, as long as Redis has lost nothing, fit all others.
func (s *schedule) ask(in *instance) {
	s.mu.Lock()
	in.asked++
	before, base := s.latest, s.base
	s.mu.Unlock()
	knew := min(in.c.status().total, base+in.knows())
	go func() {
		_, total, err := in.c.next()
		s.mu.Lock()
		defer s.mu.Unlock()
		if in.own++; err != nil || in.state == "crashed" {
			return
		}
		if in.answered++; s.lost == 0 && (total <= before || s.told[total]) {
			s.t.Errorf("got request %d to the cluster after %d was told", total, before)
		}
		if s.base == base && s.lost < 2 && total <= knew {
			s.t.Errorf("got request %d to the cluster of an instance that knew of %d", total, knew)
		}
		s.told[total], s.latest = true, max(s.latest, total)
	}()
}

// ledger returns what Redis holds: ids and values in turn, and the counts by id.
func (s *schedule) ledger() (list []string, counts map[string]int64) {
	got, err := readReply(replyReader(s.do([]string{"HGETALL", "{" + s.key + "}:ledger"})), '*')
	if err != nil {
		s.t.Fatal(err)
	}
	counts = map[string]int64{}
	for i := 0; i < len(got.list); i += 2 {
		count, _, _ := strings.Cut(got.list[i+1], " ")
		counts[got.list[i]], _ = strconv.ParseInt(count, 10, 64)
	}
	return got.list, counts
}

func (s *schedule) total() int64 { return totalOf(s.t, s.do, s.key) }

func sum(counts map[string]int64) (n int64) {
	for _, count := range counts {
		n += count
	}
	return n
}

// step does one thing at random, and checks that the total is the sum of the counts.
func (s *schedule) step() {
	living := s.living()
	in := living[s.rng.IntN(len(living))]
	carrying := s.all[s.rng.IntN(len(s.all))].w
	waiting := carrying.waiting()
	packet := s.rng.IntN(max(1, waiting))
	switch p := s.rng.IntN(100); {
	case p < 25:
		s.ask(in)
	case p < 35:
		go in.c.syncOnce()
	case p < 72 && waiting > 0:
		carrying.deliver(packet, false)
	case p < 78 && waiting > 0:
		carrying.deliver(packet, true)
	case p < 83 && waiting > 0:
		p := carrying.take(packet)
		s.late = append(s.late, p.cmd)
		p.answer <- closed
	case p < 86 && len(s.late) > 0:
		i := s.rng.IntN(len(s.late))
		s.do(s.late[i])
		s.late = slices.Delete(s.late, i, i+1)
	case p < 87:
		s.lost, s.base = s.lost+1, 0
		s.do(forget(s.key))
	case p < 88:
		list, _ := s.ledger()
		s.copy = &copied{s.total(), s.base, list}
	case p < 89 && s.copy != nil: // a failover to a replica that lacks what came later
		s.lost, s.base = s.lost+1, s.copy.base
		s.do(forget(s.key))
		s.do([]string{"SET", s.key, strconv.FormatInt(s.copy.total, 10)})
		if len(s.copy.ledger) > 0 {
			s.do(append([]string{"HSET", "{" + s.key + "}:ledger"}, s.copy.ledger...))
		}
	case p < 90:
		_, counts := s.ledger()
		s.lost, s.base = s.lost+1, -sum(counts)
		s.do([]string{"DEL", s.key})
	case p < 93 && len(living) < 4:
		s.start()
	case p < 95 && len(living) > 1:
		s.set(in, "ending")
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
			defer cancel()
			in.c.end(ctx)
			s.set(in, "ended")
		}()
	case p < 96 && len(living) > 1:
		s.set(in, "crashed")
		s.late = append(s.late, in.w.close()...)
	default:
		time.Sleep(time.Duration(s.rng.IntN(100)) * time.Millisecond)
	}
	synctest.Wait()
	if _, counts := s.ledger(); s.base+sum(counts) != s.total() {
		s.t.Errorf("got the total %d, want %d and the counts %v", s.total(), s.base, counts)
	}
}

// settle lets everything arrive and all instances sync, and checks what is known then.
func (s *schedule) settle() {
	for _, in := range s.all {
		in.w.open()
	}
	time.Sleep(2 * drainTimeout)
	for _, cmd := range s.late {
		s.do(cmd)
	}
	for range 2 {
		for _, in := range s.living() {
			if err := in.c.syncOnce(); err != nil {
				s.t.Error(err)
			}
		}
	}
	_, counts := s.ledger()
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var least, most int64
	for _, in := range s.all {
		n, own := in.c.status().n, int64(0)
		for id, count := range counts {
			if strings.HasPrefix(id, in.c.id) {
				own += count
			}
		}
		switch in.state {
		case "crashed":
			least, most = least+in.answered, most+in.asked
			continue
		case "ending":
			s.t.Error("an instance does not end")
		case "living":
			if own != n {
				s.t.Errorf("Redis has %d of the %d requests of an instance", own, n)
			}
			for id, e := range in.c.ledger {
				if counts[id] < e.count {
					s.t.Errorf("Redis has %d at %s, of which an instance knows %d", counts[id], id, e.count)
				}
			}
		}
		if n != in.asked || in.own != in.asked {
			s.t.Errorf("an instance has counted %d and answered %d of %d requests", n, in.own, in.asked)
		}
		least, most = least+in.asked, most+in.asked
	}
	if n := s.total(); s.lost == 0 && (n < least || n > most) {
		s.t.Errorf("got the total %d, want %d to %d", n, least, most)
	}
}

// Whatever the network does, whoever ends or crashes, and whatever Redis forgets, the total is the
// sum of what is counted, no number is told twice while Redis keeps its data, and after a loss
// Redis has again all that any instance knows.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
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
			do := dialRedis(t, url)
			for seed := first + part; seed < first+schedules && !t.Failed(); seed += 4 {
				key := "test:" + crand.Text()
				synctest.Test(t, func(t *testing.T) { runSchedule(t, do, key, seed) })
				do(forget(key))
			}
		})
	}
}

func runSchedule(t *testing.T, do func(cmd []string) string, key string, seed uint64) {
	s := &schedule{t: t, rng: rand.New(rand.NewPCG(seed, 0)), do: do, key: key, told: map[int64]bool{}}
	s.start()
	for range 40 + s.rng.IntN(80) {
		s.step()
	}
	s.settle()
	for _, in := range s.all {
		in.w.close()
	}
	time.Sleep(time.Minute)
	for _, in := range s.all {
		closeAll(in.c)
	}
	if t.Failed() {
		t.Errorf("to repeat this: SEED=%d go test -run TestRandomSchedules/0", seed)
	}
}
