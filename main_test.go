package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	neturl "net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"runtime"
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

// askRedis sends a command that is answered with an integer.
func askRedis(t *testing.T, url string, cmd ...string) int64 {
	t.Helper()
	c := newConn(mustParse(t, url, 5*time.Second), "", "")
	defer c.close()
	n, err := do[int64](c, time.Now().Add(5*time.Second), cmd...)
	if err != nil {
		t.Fatalf("%s: %v", cmd[0], err)
	}
	return n
}

// redisTotal returns the total at key.
func redisTotal(t *testing.T, url, key string) int64 {
	t.Helper()
	return askRedis(t, url, "INCRBY", key, "0")
}

// forget makes Redis forget what it knows of key, as a restart would.
func forget(t *testing.T, url, key string) {
	t.Helper()
	askRedis(t, url, "DEL", key, "{"+key+"}:instances", "{"+key+"}:ended")
}

// newKey returns a key that no other test uses, deleted at the end.
func newKey(t *testing.T, url string) string {
	key := "test:" + rand.Text()
	t.Cleanup(func() { forget(t, url, key) })
	return key
}

// start runs c, and returns what ends it within the time given; the end of the
// test does so at once.
func start(t *testing.T, c *counter) (end func(time.Duration)) {
	ctx, cancel := context.WithCancel(context.Background())
	var once sync.Once
	var wg sync.WaitGroup
	wg.Go(func() { c.run(ctx) })
	end = func(given time.Duration) {
		once.Do(func() {
			cancel()
			wg.Wait()
			endWithin(c, given)
		})
	}
	t.Cleanup(func() { end(0) })
	return end
}

// endWithin ends c; with no time given it does not wait until others have learned of it.
func endWithin(c *counter, given time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), given)
	defer cancel()
	c.end(ctx)
}

// closeAll closes the TCP connections of c, none of which may be in use.
func closeAll(c *counter) {
	for range cap(c.pool) {
		conn := <-c.pool
		conn.close()
		c.pool <- conn
	}
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

func TestManyClients(t *testing.T) {
	t.Parallel()
	const clients, requests = 64, 20 // of each client
	url := startRedis(t)
	key := newKey(t, url)
	var servers [3]*httptest.Server
	for i := range servers {
		servers[i], _ = newInstance(t, "host:"+strconv.Itoa(i), key, mustParse(t, url, 10*time.Second))
	}
	var mu sync.Mutex
	instance, cluster := make([][]int64, len(servers)), []int64(nil)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			last := int64(0)
			for i := range requests {
				at := (c + i) % len(servers)
				a, err := ask(servers[at].URL)
				if err != nil || a.status != 200 || a.instance != fmt.Sprintf("host:%d", at) || a.total <= last {
					t.Errorf("%+v after %d to the cluster, %v", a, last, err)
					return
				}
				last = a.total
				mu.Lock()
				instance[at], cluster = append(instance[at], a.n), append(cluster, a.total)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for i, numbers := range instance {
		oneTo(t, fmt.Sprintf("instance %d", i), numbers)
	}
	oneTo(t, "the cluster", cluster)
	if len(cluster) != clients*requests {
		t.Errorf("got %d answers, want %d", len(cluster), clients*requests)
	}
}

// refused is a Redis that is not there.
func refused(t *testing.T) *redisServer {
	s := mustParse(t, "redis://gone", 10*time.Millisecond)
	s.dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("connection refused") }
	return s
}

// Every row of the README's table of paths.
func TestPaths(t *testing.T) {
	t.Parallel()
	const first, plain = "You are talking to instance host:1.\n", "text/plain; charset=utf-8"
	alone := func(t *testing.T) (*httptest.Server, *handler) { return newInstance(t, "host:1", "k", nil) }
	cutOff := func(t *testing.T) (*httptest.Server, *handler) {
		h := &handler{counter: newCounter("host:1", "k", refused(t)), instance: "host:1"}
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

// An instance that has been ready stays so while Redis is down, and says so in
// the metrics.
func TestRedisLostLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: func(cmd []string) string {
			return map[string]string{"HLEN": ":0\r\n", "HEXISTS": ":0\r\n", "HGETALL": "*0\r\n", "EVALSHA": ":3\r\n"}[cmd[0]]
		}}
		h := &handler{counter: newCounter("host:1", "k", f.server(t, "redis://fake")), instance: "host:1"}
		for _, step := range []struct {
			name    string
			gone    bool
			status  int
			ready   int
			metrics []string
		}{
			{"before Redis", true, 503, 503, []string{"requestcount_instance_requests_total 1", "requestcount_cluster_requests 0", "requestcount_redis_up 0"}},
			{"Redis", false, 200, 200, []string{"requestcount_instance_requests_total 2", "requestcount_cluster_requests 3", "requestcount_redis_up 1"}},
			{"Redis gone", true, 503, 200, []string{"requestcount_instance_requests_total 3", "requestcount_cluster_requests 3", "requestcount_redis_up 0"}},
		} {
			f.gone.Store(step.gone)
			closeAll(h.counter)
			h.counter.heartbeat()
			for path, want := range map[string]int{"/": step.status, "/readyz": step.ready, "/metrics": 200} {
				w := httptest.NewRecorder()
				h.routes().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
				if w.Code != want {
					t.Errorf("%s: %s: got %d %s, want %d", step.name, path, w.Code, w.Body, want)
				}
			}
			w := httptest.NewRecorder()
			h.routes().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
			for _, line := range step.metrics {
				name, _, _ := strings.Cut(line, " ")
				for _, part := range []string{"\n" + line + "\n", "# HELP " + name + " ", "\n# TYPE " + name + " "} {
					if !strings.Contains("\n"+w.Body.String(), part) {
						t.Errorf("%s: no %q in the metrics:\n%s", step.name, part, w.Body)
					}
				}
			}
		}
		closeAll(h.counter)
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
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
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

func TestUsage(t *testing.T) {
	t.Parallel()
	out, err := command(t, nil, "-h").Output()
	if err != nil || string(out) != usage {
		t.Errorf("got %v, %q", err, out)
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
	p := startProcess(t, "REDIS_URL="+url, "REDIS_KEY="+key, "REDIS_TIMEOUT=5s", "SHUTDOWN_DELAY=300ms")
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
	time.Sleep(50 * time.Millisecond)
	if resp, body := get(t, "GET", p.url+"/readyz"); resp.StatusCode != 503 {
		t.Errorf("while stopping: got %s %q, want 503", resp.Status, body)
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

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	for _, atOnce := range []bool{true, false} {
		p := startProcess(t, "SHUTDOWN_DELAY=1h")
		p.Process.Signal(syscall.SIGTERM)
		for ready := !atOnce; ready; {
			resp, _ := get(t, "GET", p.url+"/readyz")
			ready = resp.StatusCode == http.StatusOK
		}
		p.Process.Signal(os.Interrupt)
		if status, log := p.wait(); status != 1 || !strings.HasSuffix(log, "requestcount: ended at once by a second signal\n") {
			t.Errorf("at once %t: got status %d\n%s", atOnce, status, log)
		}
	}
}

// The log has the start, each change of Redis with its cause, the stop, and no secret.
func TestLog(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	proxy := newProxy(t, url)
	at, err := neturl.Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	at.Host = proxy.Addr().String()
	proxy.set(refuse)
	p := startProcess(t, "REDIS_URL="+at.String(), "REDIS_KEY="+newKey(t, url), "REDIS_TIMEOUT=500ms")
	if resp, _ := get(t, "GET", p.url); resp.StatusCode != 503 {
		t.Errorf("without Redis: got %s, want 503", resp.Status)
	}
	proxy.set(none)
	for {
		if resp, _ := get(t, "GET", p.url); resp.StatusCode == 200 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.Process.Signal(syscall.SIGTERM)
	status, log := p.wait()
	var got []string
	for _, m := range regexp.MustCompile(`msg=("[^"]*"|\S+)`).FindAllStringSubmatch(log, -1) {
		got = append(got, strings.Trim(m[1], `"`))
	}
	if want := []string{"start", "Redis is down", "Redis is up", "stopping", "stop"}; status != 0 || !slices.Equal(got, want) {
		t.Errorf("got status %d, %s; want %s\n%s", status, got, want, log)
	}
	for _, part := range []string{"redis=" + proxy.Addr().String(), "go=go1.", "version=", `cause="` + proxy.Addr().String() + ": "} {
		if !strings.Contains(log, part) {
			t.Errorf("no %q in the log:\n%s", part, log)
		}
	}
}

// A line that arrives in parts stays one line, however long.
func TestLineInParts(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	for _, tt := range []struct{ head, rest string }{
		{"GET /?", " HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: ", "B: c\r\n\r\n"},
	} {
		nc := dial(t, p)
		line := tt.head[strings.LastIndex(tt.head, "\n")+1:]
		io.WriteString(nc, tt.head+strings.Repeat("a", 4095-len(line)))
		time.Sleep(50 * time.Millisecond)
		if got := request(nc, strings.Repeat("a", 2000)+tt.rest); got != "HTTP/1.1 200 OK" {
			t.Errorf("%q: got %q, want 200", tt.head, got)
		}
	}
}

func dial(t *testing.T, p *process) net.Conn {
	nc, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc
}

// request sends text and returns the first line of the answer, or nothing.
func request(nc net.Conn, text string) string {
	go io.WriteString(nc, text)
	line, _ := bufio.NewReader(nc).ReadString('\n')
	return strings.TrimRight(line, "\r\n")
}

// Slow and malformed clients get what HTTP says and hold nobody up.
func TestBadClients(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	dial(t, p) // says nothing
	for _, tt := range []struct{ request, status string }{
		{"nonsense\r\n\r\n", "HTTP/1.1 400"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 32<<10) + "\r\n\r\n", "HTTP/1.1 431"},
		{"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", "HTTP/1.1 200"},
	} {
		if line := request(dial(t, p), tt.request); !strings.HasPrefix(line, tt.status) {
			t.Errorf("%.30q: got %q, want %s", tt.request, line, tt.status)
		}
	}
	if a, err := ask(p.url); err != nil || a.n != 2 || a.total != 2 {
		t.Errorf("got %+v, %v; want request 2", a, err)
	}
}

// The server leaves the number of processors to Go, and closes no idle
// connection before a load balancer does.
func TestServer(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run(ctx, config{addr: "127.0.0.1:0", key: "k"}); err != nil || runtime.GOMAXPROCS(0) != before {
		t.Errorf("got %v, %d processors; want %d", err, runtime.GOMAXPROCS(0), before)
	}
	s := newServer(nil, 20*time.Second)
	if s.IdleTimeout <= 600*time.Second || s.WriteTimeout <= 40*time.Second || s.ReadTimeout+2*learnInterval >= drainTimeout {
		t.Errorf("got an idle time-out of %v, one for answers of %v, one for requests of %v", s.IdleTimeout, s.WriteTimeout, s.ReadTimeout)
	}
}

const acl = "-@all +ping +auth +get +incrby +hget +hset +hsetnx +hexists +hdel +hlen +hgetall +eval +evalsha"

// Compose and the chart give their Redis user what the README says that the service needs.
func TestACLIsTheSameEverywhere(t *testing.T) {
	t.Parallel()
	plain := strings.NewReplacer("'", "", "- ", "") // without YAML's quotes and list items
	for _, file := range []string{"docker-compose.yml", "helm/templates/redis-deployment.yaml", "README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if words := strings.Join(strings.Fields(plain.Replace(string(text))), " "); !strings.Contains(words, acl) {
			t.Errorf("%s does not have %s", file, acl)
		}
	}
}

// A proxy passes bytes between clients and Redis, and has faults to order.
type proxy struct {
	net.Listener
	target string

	mu    sync.Mutex
	moved *sync.Cond
	fault fault
	conns map[net.Conn]bool
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
			client, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.serve(client) })
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
	for nc := range p.conns {
		nc.(*net.TCPConn).SetLinger(0)
		nc.Close()
	}
}

func (p *proxy) serve(client net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		client.Close()
		return
	}
	p.mu.Lock()
	p.conns[client] = true
	refused := p.fault == refuse
	p.mu.Unlock()
	if refused {
		p.reset()
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(server, client, true) })
	wg.Go(func() { p.copy(client, server, false) })
	wg.Wait()
	p.mu.Lock()
	delete(p.conns, client)
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

// A tally is what the clients of one counter were told.
type tally struct {
	mu       sync.Mutex
	instance []int64
	cluster  []int64 // of those answered with one
}

// load has 16 clients ask c until stop is closed.
func load(c *counter, stop <-chan struct{}) *tally {
	var t tally
	var wg sync.WaitGroup
	for range 16 {
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
		fault   func(p *proxy, forget func())
		loses   bool // Redis loses its memory: numbers may repeat
		fails   bool // some requests must be answered without a number; else none may be
	}{
		{name: "connections reset", timeout: long, fault: func(p *proxy, _ func()) {
			for range 20 {
				p.reset()
				time.Sleep(5 * time.Millisecond)
			}
		}},
		{name: "replies swallowed", timeout: 2 * time.Second, fault: func(p *proxy, _ func()) {
			p.set(swallow)
			time.Sleep(50 * time.Millisecond)
			p.reset()
			p.set(none)
		}},
		{name: "commands delivered after they were given up", timeout: short, fault: lasts(hold, 3*short), fails: true},
		{name: "refused for less than the timeout", timeout: long, fault: lasts(refuse, 200*time.Millisecond)},
		{name: "refused for more than the timeout", timeout: short, fault: lasts(refuse, 3*short), fails: true},
		{name: "silent for less than the timeout", timeout: 2 * time.Second, fault: lasts(vanish, 500*time.Millisecond)},
		{name: "silent for more than the timeout", timeout: short, fault: lasts(vanish, 3*short), fails: true},
		{name: "emptied", timeout: long, loses: true, fault: func(_ *proxy, forget func()) {
			for range 10 {
				forget()
				time.Sleep(10 * time.Millisecond)
			}
		}},
		{name: "gone and back empty, for more than the timeout", timeout: short, loses: true, fails: true, fault: func(p *proxy, forget func()) {
			p.set(refuse)
			forget()
			time.Sleep(3 * short)
			p.set(none)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			url := startRedis(t)
			p := newProxy(t, url)
			key := newKey(t, url)
			s := mustParse(t, url, tt.timeout)
			s.addr = p.Addr().String()
			counters := []*counter{newCounter("faulty:1", key, s), newCounter("steady:1", key, mustParse(t, url, long))}
			var ends []func(time.Duration)
			var tallies [2]*tally
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for i, c := range counters {
				c.heartbeat() // all connections are dialed before the fault
				ends = append(ends, start(t, c))
				wg.Go(func() { tallies[i] = load(c, stop) })
			}
			time.Sleep(50 * time.Millisecond)
			tt.fault(p, func() { forget(t, url, key) })
			time.Sleep(150 * time.Millisecond)
			close(stop)
			wg.Wait()

			faulty, steady := tallies[0], tallies[1]
			want := int64(len(faulty.instance) + len(steady.instance))
			for began := time.Now(); redisTotal(t, url, key) != want && time.Since(began) < 5*time.Second; {
				time.Sleep(20 * time.Millisecond) // until the heartbeats
			}
			for _, when := range []string{"while the instances run", "after they have ended"} {
				if got := redisTotal(t, url, key); got != want {
					t.Errorf("%s: got the total %d, want %d", when, got, want)
				}
				for _, end := range ends {
					end(0)
				}
			}
			oneTo(t, "the faulty instance", faulty.instance)
			oneTo(t, "the steady instance", steady.instance)
			if failed := len(faulty.instance) - len(faulty.cluster); (failed > 0) != tt.fails {
				t.Errorf("%d of %d requests had no number of the cluster; want some: %t", failed, len(faulty.instance), tt.fails)
			}
			if len(steady.cluster) != len(steady.instance) {
				t.Errorf("the steady instance failed %d requests", len(steady.instance)-len(steady.cluster))
			}
			all := slices.Sorted(slices.Values(slices.Concat(faulty.cluster, steady.cluster)))
			if n := len(slices.Compact(slices.Clone(all))); n != len(all) && !tt.loses {
				t.Errorf("got %d numbers in %d answers", n, len(all))
			}
		})
	}
}

// A request does not wait for the round trip of another, up to eight at a time;
// those beyond share the next command.
func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var commands atomic.Int64
		f := &fakeRedis{answer: func(cmd []string) string {
			n := commands.Add(1)
			time.Sleep(100 * time.Millisecond)
			return fmt.Sprintf(":%d\r\n", 10*n)
		}}
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

// While Redis is down, requests are answered at once, and the instance tries at
// most once a second.
func TestDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var counts []int // that were sent since they were last taken
		take := func() []int {
			mu.Lock()
			defer mu.Unlock()
			defer func() { counts = nil }()
			return slices.Sorted(slices.Values(counts))
		}
		f := &fakeRedis{answer: func(cmd []string) string {
			mu.Lock()
			defer mu.Unlock()
			if cmd[0] == "EVALSHA" {
				n, _ := strconv.Atoi(cmd[7])
				counts = append(counts, n)
			}
			return zero(cmd)
		}}
		f.gone.Store(true)
		c := newCounter("host:1", "k", f.server(t, "redis://fake"))
		end := start(t, c)
		time.Sleep(10 * time.Second)
		before := len(f.dials())
		time.Sleep(10 * time.Second)
		if n := len(f.dials()) - before; n < 9 || n > 11 {
			t.Errorf("got %d attempts in 10 s, want about 10", n)
		}
		for want := range int64(3) {
			began := time.Now()
			if n, _, err := c.next(); n != want+1 || err == nil || time.Since(began) != 0 {
				t.Errorf("got request %d, %v after %v; want %d and an error at once", n, err, time.Since(began), want+1)
			}
		}
		if err := c.status().notReady; err == nil || err.Error() != "fake:6379: connection refused" {
			t.Errorf("ready says %v, want fake:6379: connection refused", err)
		}
		f.gone.Store(false)
		time.Sleep(time.Second)
		if sent := take(); len(sent) == 0 || sent[len(sent)-1] != 3 || !c.status().up {
			t.Errorf("got counts %d once Redis was up; want one of 3, which were owed", sent)
		}
		time.Sleep(10 * time.Second)
		if n := len(take()); n != 10*connections {
			t.Errorf("got %d heartbeats in 10 s, want 10 of each connection", n)
		}
		end(0)
	})
}

// Connections that have died in silence do not keep an instance from reporting
// back, each for half of the timeout.
func TestAllDeadInSilence(t *testing.T) {
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		gone    time.Duration // for so long no fresh connection is there, and a request fails
		within  time.Duration // of Redis' return
	}{
		{name: "while Redis is away", timeout: time.Second, gone: 1300 * time.Millisecond, within: time.Second},
		{name: "an idle instance", timeout: time.Second, within: 2 * time.Second},
		{name: "an idle instance, with the timeout of the chart", timeout: 5 * time.Second, within: 5 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var sent atomic.Int64
				f := &fakeRedis{answer: func(cmd []string) string {
					if cmd[0] == "EVALSHA" {
						sent.Add(1)
					}
					return zero(cmd)
				}}
				s := f.server(t, "redis://fake")
				s.timeout = tt.timeout
				c := newCounter("host:1", "k", s)
				end := start(t, c)
				time.Sleep(100 * time.Millisecond)
				f.muted.Store(connections)
				if tt.gone > 0 {
					f.gone.Store(true)
					began := time.Now()
					if _, _, err := c.next(); err == nil {
						t.Error("got no error, want one")
					}
					time.Sleep(tt.gone - time.Since(began)) // in which two or three are dialed again
					f.gone.Store(false)
				}
				sent.Store(0)
				time.Sleep(tt.within)
				if n := sent.Load(); n < connections || !c.status().up {
					t.Errorf("got %d counts in %v, up %t; want one of each of %d connections", n, tt.within, c.status().up, connections)
				}
				dials := len(f.dials())
				if tt.gone == 0 && dials != 2*connections {
					t.Errorf("got %d dials, want two for each of %d connections", dials, connections)
				}
				time.Sleep(5 * time.Second)
				if n := len(f.dials()); n != dials {
					t.Errorf("got %d more dials in the 5 s after that, want none", n-dials)
				}
				end(0)
			})
		})
	}
}

// After an outage MOVED leads each connection on at once, also where the node
// that it led to before does not come back, and so it does at the end.
func TestMovedAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var owner atomic.Pointer[string]
		move := func(addr string) { owner.Store(&addr) }
		move("old:1")
		pointer := &fakeRedis{answer: func([]string) string { return "-MOVED 866 " + *owner.Load() + "\r\n" }}
		var told atomic.Bool
		node := &fakeRedis{answer: func(cmd []string) string {
			if cmd[0] == "EVAL" {
				told.Store(true)
			}
			return zero(cmd)
		}}
		s := pointer.server(t, "redis://fake")
		dialPointer, dialNode := s.dial, node.server(t, "redis://fake").dial
		s.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			switch addr {
			case "fake:6379":
				return dialPointer(ctx, network, addr)
			case *owner.Load():
				return dialNode(ctx, network, addr)
			}
			return nil, errors.New("no route to host")
		}
		c := newCounter("host:1", "k", s)
		end := start(t, c)
		time.Sleep(time.Second) // all connections are dialed at the first owner
		pointer.gone.Store(true)
		node.gone.Store(true)
		node.muted.Store(connections)
		if _, _, err := c.next(); err == nil {
			t.Error("got no error, want one")
		}
		time.Sleep(10 * time.Second)
		move("new:1")
		pointer.gone.Store(false)
		node.gone.Store(false)
		time.Sleep(heartbeatInterval)
		if s := c.status(); !s.up {
			t.Error("Redis is taken to be down a second after it is back")
		}
		end(time.Second)
		if !told.Load() {
			t.Error("the node was not told of the end")
		}
	})
}

// A batch that waits for a connection as Redis goes down fails too, and is owed.
func TestWaitingBatchIsOwed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{}
		f.gone.Store(true)
		c := newCounter("host:1", "k", f.server(t, "redis://fake"))
		var wg sync.WaitGroup
		for i := range connections + 2 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond) // one batch for each connection, the last two wait
				if _, _, err := c.next(); err == nil {
					t.Error("got no error, want one")
				}
			})
		}
		wg.Wait()
		sum := c.owed
		for range connections {
			sum += (<-c.pool).count
		}
		if sum != connections+2 || c.status().n != sum {
			t.Errorf("got %d requests for later commands of %d counted, want %d", sum, c.status().n, connections+2)
		}
	})
}

// A batch that fails wakes the heartbeat, which would sleep out its second.
func TestFailedBatchWakesHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: zero}
		s := f.server(t, "redis://fake")
		s.timeout = 200 * time.Millisecond
		c := newCounter("host:1", "k", s)
		end := start(t, c)
		time.Sleep(100 * time.Millisecond) // after the first heartbeat
		closeAll(c)
		f.gone.Store(true)
		if _, _, err := c.next(); err == nil {
			t.Error("got no error, want one")
		}
		f.gone.Store(false)
		time.Sleep(200 * time.Millisecond)
		if !c.status().up {
			t.Error("Redis is taken to be down 200 ms after it is back")
		}
		end(0)
	})
}

// An instance without requests sees those of the others.
func TestHeartbeatSeesTheCluster(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	busy := newCounter("busy:1", key, mustParse(t, url, 5*time.Second))
	idle := newCounter("idle:1", key, mustParse(t, url, 5*time.Second))
	idle.next()
	for want := int64(2); want < 5; want++ {
		busy.next()
		idle.heartbeat()
		if s := idle.status(); s.total != want {
			t.Errorf("the idle instance sees %d, want %d", s.total, want)
		}
	}
}

// After a restart of Redis all that have ended are compared, not only their number.
func TestEndedAreComparedAfterRestart(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	other := newCounter("other:1", key, mustParse(t, url, 5*time.Second))
	other.next()
	endWithin(other, 0)
	c := newCounter("host:1", key, mustParse(t, url, 5*time.Second))
	c.ended["forgotten:1/X"] = "5"
	c.heartbeat()
	if n := redisTotal(t, url, key); n != 6 || c.ended[other.id] != "1" {
		t.Errorf("got the total %d and %v, want 6 and %s", n, c.ended, other.id)
	}
}

// Where Redis has forgotten those that had ended, and as many have ended since,
// all are compared too.
func TestEndedAreComparedWhereAsMany(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	c := newCounter("host:1", key, mustParse(t, url, 5*time.Second))
	defer closeAll(c)
	for i := range 3 {
		other := newCounter(fmt.Sprint("other:", i), key, mustParse(t, url, 5*time.Second))
		other.next()
		if i > 0 {
			forget(t, url, key)
		}
		endWithin(other, 0)
		for range connections { // the next heartbeat ends with another connection
			c.heartbeat()
			c.next()
		}
		if n, want := redisTotal(t, url, key), c.status().n+int64(i)+1; n != want || len(c.ended) != i+1 {
			t.Errorf("after %d had ended: got the total %d and %v, want %d", i+1, n, c.ended, want)
		}
	}
}

// An instance is noted as ended also where another one ended a moment before, so
// that their number is the one that it expects.
func TestEndBesideAnother(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	other := newCounter("other:1", key, mustParse(t, url, 5*time.Second))
	c := newCounter("host:1", key, mustParse(t, url, 5*time.Second))
	for range connections {
		c.heartbeat()
		c.next() // the next heartbeat begins with another connection
	}
	endWithin(other, 0)
	endWithin(c, 0)
	if n := askRedis(t, url, "HLEN", "{"+key+"}:ended"); n != 2 {
		t.Errorf("got %d ended, want 2", n)
	}
}

// An instance that has counted nothing does not wait for a Redis that is away.
func TestEndWithNothingToTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounter("host:1", "k", refused(t))
		c.heartbeat()
		began := time.Now()
		c.end(t.Context())
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v, want no time", took)
		}
	})
}

// An instance that ends stays until the others have had a heartbeat to learn of
// it, and tells Redis again where that has forgotten meanwhile.
func TestEndWaitsUntilOthersKnow(t *testing.T) {
	for _, tt := range []struct {
		name    string
		n       int64
		loses   bool // the first reply
		silent  bool // the connections from before
		forgets bool // after a second
		another bool // has ended then
		closes  bool // connections, after 1.5 s
		told    int
		took    time.Duration
	}{
		{name: "Redis remembers", n: 1, told: 1, took: 1500 * time.Millisecond},
		{name: "Redis forgets", n: 1, forgets: true, told: 2, took: 3 * time.Second},
		{name: "Redis forgets it, and another one has ended", n: 1, forgets: true, another: true, told: 2, took: 3 * time.Second},
		{name: "Redis is away for a moment", n: 1, closes: true, told: 1, took: 3100 * time.Millisecond},
		{name: "connections dead in silence", n: 1, silent: true, told: 1, took: 1500 * time.Millisecond},
		{name: "the reply is lost", n: 1, loses: true, told: 1, took: 1600 * time.Millisecond},
		{name: "nothing was counted", told: 1},
		{name: "nothing was counted, and the reply is lost", loses: true, told: 1, took: 100 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				told, other, ended := 0, "$9\r\nother:1/X\r\n$1\r\n5\r\n", ""
				began := time.Now()
				f := &fakeRedis{answer: func(cmd []string) string {
					mu.Lock()
					defer mu.Unlock()
					switch {
					case tt.closes && time.Since(began) == learnInterval:
						return "close"
					case cmd[0] == "EVAL":
						told, ended = told+1, fmt.Sprintf("$%d\r\n%s\r\n$1\r\n%s\r\n", len(cmd[7]), cmd[7], cmd[8])
						if tt.loses {
							return "close"
						}
					case cmd[0] == "HLEN":
						return fmt.Sprintf(":%d\r\n", strings.Count(other+ended, "\n")/4)
					case cmd[0] == "HGETALL":
						return fmt.Sprintf("*%d\r\n", strings.Count(other+ended, "\n")/2) + other + ended
					}
					return ":1\r\n"
				}}
				c := newCounter("host:1", "k", f.server(t, "redis://fake"))
				c.n, c.owed = tt.n, tt.n
				c.ended["other:1/X"] = "5"
				if tt.silent {
					c.heartbeat()
					f.muted.Store(connections)
				}
				if tt.forgets {
					time.AfterFunc(time.Second, func() {
						mu.Lock()
						defer mu.Unlock()
						ended = ""
						if tt.another {
							other += "$9\r\nafter:1/X\r\n$1\r\n5\r\n"
						}
					})
				}
				c.end(t.Context())
				if took := time.Since(began); told != tt.told || took != tt.took {
					t.Errorf("told %d times in %v, want %d in %v", told, took, tt.told, tt.took)
				}
			})
		})
	}
}

// Heartbeats read those that have ended once for a TCP connection, else only how
// many they are, and tell Redis of none that it has. An instance's own counts go first.
func TestEndedAreReadOnce(t *testing.T) {
	for name, replies := range map[string]map[string]string{
		"none has ended": {"HLEN": ":0\r\n", "HEXISTS": ":0\r\n", "HGETALL": "*0\r\n", "EVALSHA": ":5\r\n"},
		"one has ended":  {"HLEN": ":1\r\n", "HEXISTS": ":1\r\n", "HGETALL": "*2\r\n$3\r\na/X\r\n$1\r\n5\r\n", "EVALSHA": ":5\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent := map[string]int{}
				f := &fakeRedis{answer: func(cmd []string) string {
					if cmd[0] != "EVALSHA" && sent["EVALSHA"]%connections != 0 {
						t.Errorf("got %s after %d counts", cmd[0], sent["EVALSHA"])
					}
					sent[cmd[0]]++
					return replies[cmd[0]]
				}}
				c := newCounter("host:1", "k", f.server(t, "redis://fake"))
				for i := range 4 {
					if err := c.heartbeat(); err != nil {
						t.Error(err)
					}
					if i >= 2 {
						closeAll(c)
					}
				}
				if want := map[string]int{"EVALSHA": 4 * connections, "HLEN": 2, "HEXISTS": 2, "HGETALL": 2}; !reflect.DeepEqual(sent, want) {
					t.Errorf("got %v, want %v", sent, want)
				}
			})
		})
	}
}

// A connection that Redis closes is dialed again, the others are kept.
func TestOneClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closing := false
		f := &fakeRedis{answer: func(cmd []string) string {
			if closing {
				closing = false
				return "close"
			}
			return zero(cmd)
		}}
		c := newCounter("host:1", "k", f.server(t, "redis://fake"))
		for range 3 {
			if err := c.heartbeat(); err != nil {
				t.Error(err)
			}
			closing = true
		}
		closeAll(c)
		if n := len(f.dials()); n != connections+2 {
			t.Errorf("got %d dials, want %d, and one for each that was closed", n, connections)
		}
	})
}

// What is owed at the end is told while Redis comes back within the time given.
func TestEndWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	p := newProxy(t, url)
	key := newKey(t, url)
	s := mustParse(t, url, 50*time.Millisecond)
	s.addr = p.Addr().String()
	p.set(refuse)
	c := newCounter("host:1", key, s)
	end := start(t, c)
	for range 7 {
		c.next()
	}
	time.AfterFunc(300*time.Millisecond, func() { p.set(none) })
	end(5 * time.Second)
	if n := redisTotal(t, url, key); n != 7 {
		t.Errorf("got the total %d, want 7", n)
	}
	if n := askRedis(t, url, "HLEN", "{"+key+"}:instances"); n != 0 {
		t.Errorf("the ledger has %d entries, want 0", n)
	}
}

// What ended instances have counted outlives Redis' memory, as long as one
// instance lives that has learned of them.
func TestEndedOutliveMemory(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	var counters []*counter
	for i := range 5 {
		counters = append(counters, newCounter("host:"+strconv.Itoa(i), key, mustParse(t, url, 5*time.Second)))
	}
	for i := range 101 {
		counters[i%5].next()
	}
	for i := 4; i > 0; i-- {
		endWithin(counters[i], 0)
		for _, c := range counters[:i] {
			c.heartbeat()
		}
		forget(t, url, key)
		for _, c := range counters[:i] {
			c.heartbeat()
		}
		if n := redisTotal(t, url, key); n != 101 {
			t.Errorf("with %d instances left: got the total %d, want 101", i, n)
		}
	}
	if _, n, err := counters[0].next(); n != 102 || err != nil {
		t.Errorf("got %d, %v; want 102", n, err)
	}
}

// Numbers beyond what Lua would write as 1e+08 or in 14 digits stay exact.
func TestLargeNumbers(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	for _, n := range []int64{99_999_999, 999_999_999_999_999, 1<<53 - 3} {
		key := newKey(t, url)
		c := newCounter("host:1", key, mustParse(t, url, 5*time.Second))
		c.n, c.owed = n, n
		if i, total, err := c.next(); i != n+1 || total != n+1 || err != nil {
			t.Errorf("after %d: got %d, %d, %v", n, i, total, err)
		}
		endWithin(c, 0)
		forget(t, url, key)
		c = newCounter("host:2", key, mustParse(t, url, 5*time.Second))
		c.ended["host:1/X"] = strconv.FormatInt(n+1, 10)
		c.heartbeat()
		if _, total, err := c.next(); total != n+2 || err != nil {
			t.Errorf("after %d that an ended instance had counted: got %d, %v", n+1, total, err)
		}
	}
}
