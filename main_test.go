package main

import (
	"bufio"
	"cmp"
	"context"
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
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// realRedis is the server at REDIS_URL, if the tests are to use one.
var realRedis = os.Getenv("REDIS_URL")

// processors is how many Go uses by itself here.
var processors = runtime.GOMAXPROCS(0)

// program is the built binary, if the processes that the tests start are to be of it.
var program = os.Getenv("PROGRAM")

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

// command returns the program as a process of its own with the settings in env only.
func command(t *testing.T, env []string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, cmp.Or(program, os.Args[0]), args...)
	cmd.Env = append([]string{"TEST_MAIN=1"}, env...)
	return cmd
}

// A process is a running server.
type process struct {
	*exec.Cmd
	url string
	log strings.Builder // complete after wait
	eof chan struct{}
}

var startLine = regexp.MustCompile(`msg=start addr=\S*:(\d+) `)

// startProcess starts a server, on a free port unless env has an ADDR, and
// waits until it listens.
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
	port := make(chan string, 1)
	go func() {
		defer close(p.eof)
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			fmt.Fprintln(&p.log, lines.Text())
			if m := startLine.FindStringSubmatch(lines.Text()); m != nil {
				port <- m[1]
			}
		}
	}()
	select {
	case n := <-port:
		p.url = "http://127.0.0.1:" + n
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

// newServer returns an instance in this process, and its counter.
func newServer(t *testing.T, instance, key string, r *redis) (*httptest.Server, *handler) {
	c := newCounter(instance, key, r)
	start(t, c)
	h := newHandler(instance, c)
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s, h
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
func ask(c *http.Client, url string) (a answer, err error) {
	resp, err := c.Get(url)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil { // not to be taken for a connection that was refused
		return a, fmt.Errorf("%s: answer cut off: %v", resp.Status, err)
	}
	a.status = resp.StatusCode
	form, numbers := "This is request %d to this instance and request %d to the cluster.\n", []any{&a.n, &a.total}
	if a.status == http.StatusServiceUnavailable {
		form, numbers = "This is request %d to this instance; the cluster count is unavailable.\n", numbers[:1]
	}
	first, second, _ := strings.Cut(string(body), "\n")
	a.instance = strings.TrimSuffix(strings.TrimPrefix(first, "You are talking to instance "), ".")
	if _, err := fmt.Sscanf(second, form, numbers...); err != nil || len(first)-len(a.instance) != len("You are talking to instance .") {
		return a, fmt.Errorf("%s: not the promised answer: %q", resp.Status, body)
	}
	return a, nil
}

func TestTwoInstancesOneRedis(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	one, _ := newServer(t, "host1:8083", key, mustParse(t, url, 5*time.Second))
	two, _ := newServer(t, "host2:8083", key, mustParse(t, url, 5*time.Second))
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
		servers[i], _ = newServer(t, "host:"+strconv.Itoa(i), key, mustParse(t, url, 10*time.Second))
	}
	var mu sync.Mutex
	instance, cluster := make([][]int64, len(servers)), []int64(nil)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			last := int64(0)
			for i := range requests {
				at := (c + i) % len(servers)
				a, err := ask(http.DefaultClient, servers[at].URL)
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
		t.Errorf("%d answers to %d requests", len(cluster), clients*requests)
	}
}

// refused is a Redis that is not there.
func refused() *redis {
	return &redis{addr: "gone:6379", timeout: 10 * time.Millisecond, dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("connection refused")
	}}
}

// Every row of the README's table of paths.
func TestPaths(t *testing.T) {
	t.Parallel()
	const first, plain = "You are talking to instance host:1.\n", "text/plain; charset=utf-8"
	alone := func(t *testing.T) (*httptest.Server, *handler) { return newServer(t, "host:1", "k", nil) }
	cutOff := func(t *testing.T) (*httptest.Server, *handler) { return newServer(t, "host:1", "k", refused()) }
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
		{"favicon", "GET /favicon.ico", alone, 404, nil, "…", 0},
		{"healthz", "GET /healthz", cutOff, 200, nil, "ok\n", 0},
		{"healthz while stopping", "GET /healthz", stopping, 200, map[string]string{"Connection": "close"}, "ok\n", 0},
		{"readyz", "GET /readyz", alone, 200, nil, "ready\n", 0},
		{"readyz before Redis", "GET /readyz", cutOff, 503, nil, "not ready: …", 0},
		{"readyz while stopping", "GET /readyz", stopping, 503, map[string]string{"Connection": "close"}, "not ready: stopping\n", 0},
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
				t.Errorf("%s %q, want %d %q", resp.Status, body, tt.status, tt.body)
			}
			for name, want := range tt.header {
				got := resp.Header.Get(name)
				if name == "Connection" && resp.Close { // net/http takes this header out
					got = "close"
				}
				if got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if n := h.counter.stats().instance; n != tt.counted {
				t.Errorf("%d requests counted, want %d", n, tt.counted)
			}
		})
	}
}

// An instance that has been ready stays so while Redis is down, and says so in
// the metrics.
func TestRedisLostLater(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	p := newProxy(t, url)
	r := mustParse(t, url, time.Second)
	r.addr = p.Addr().String()
	s, h := newServer(t, "host:1", newKey(t, url), r)
	want := func(status int, metrics ...string) {
		t.Helper()
		if resp, body := get(t, "GET", s.URL); resp.StatusCode != status {
			t.Errorf("GET /: %s %q, want %d", resp.Status, body, status)
		}
		if resp, body := get(t, "GET", s.URL+"/readyz"); resp.StatusCode != 200 {
			t.Errorf("GET /readyz: %s %q", resp.Status, body)
		}
		_, body := get(t, "GET", s.URL+"/metrics")
		for _, line := range metrics {
			name, _, _ := strings.Cut(line, " ")
			for _, part := range []string{"\n" + line + "\n", "# HELP " + name + " ", "\n# TYPE " + name + " "} {
				if !strings.Contains("\n"+body, part) {
					t.Errorf("no %q in the metrics:\n%s", part, body)
				}
			}
		}
	}
	for h.counter.ready() != nil {
		time.Sleep(time.Millisecond)
	}
	want(200, "requestcount_instance_requests_total 1", "requestcount_cluster_requests_total 1", "requestcount_redis_up 1")
	p.set(refuse)
	h.counter.heartbeat()
	want(503, "requestcount_instance_requests_total 2", "requestcount_cluster_requests_total 1", "requestcount_redis_up 0")
	p.set(none)
	h.counter.heartbeat()
	want(200, "requestcount_instance_requests_total 3", "requestcount_cluster_requests_total 3", "requestcount_redis_up 1")
}

// A wrong setting or argument ends the start with one line and status 2.
func TestRefusedStarts(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() }) // after the parallel subtests
	for _, tt := range []struct {
		env    string
		args   string
		status int
		says   string
	}{
		{"ADDR=8083", "", 2, `ADDR="8083": want host:port`},
		{"ADDR=:", "", 2, `ADDR=":": want host:port`},
		{"ADDR=:65536", "", 2, `ADDR=":65536": want a port`},
		{"ADDR=:http-or-so", "", 2, `ADDR=":http-or-so": want a port`},
		{"ADDR=" + taken.Addr().String(), "", 1, "address already in use"},
		{"REDIS_KEY=a{b", "", 2, `REDIS_KEY="a{b": want a key`},
		{"REDIS_KEY=a}b", "", 2, `REDIS_KEY="a}b": want a key`},
		{"REDIS_KEY= ", "", 2, `REDIS_KEY=" ": want a key`},
		{"REDIS_TIMEOUT=1", "", 2, `REDIS_TIMEOUT="1": want a duration above zero`},
		{"REDIS_TIMEOUT=0s", "", 2, `REDIS_TIMEOUT="0s": want a duration above zero`},
		{"REDIS_TIMEOUT=-1s", "", 2, `REDIS_TIMEOUT="-1s": want a duration above zero`},
		{"SHUTDOWN_DELAY=soon", "", 2, `SHUTDOWN_DELAY="soon": want a duration, not negative`},
		{"SHUTDOWN_DELAY=-1s", "", 2, `SHUTDOWN_DELAY="-1s": want a duration, not negative`},
		{"REDIS_URL=localhost:6379", "", 2, `REDIS_URL="localhost:6379": want redis://`},
		{"REDIS_URL=http://localhost", "", 2, `REDIS_URL="http://localhost": want redis://`},
		{"REDIS_URL=redis://", "", 2, "names no host"},
		{"REDIS_URL=redis://:6379", "", 2, "names no host"},
		{"REDIS_URL=redis://host:0", "", 2, "port is not a number from 1 to 65535"},
		{"REDIS_URL=redis://host:65536", "", 2, "port is not a number from 1 to 65535"},
		{"REDIS_URL=redis://host:", "", 2, "port is not a number from 1 to 65535"},
		{"REDIS_URL=redis://host/x", "", 2, `REDIS_URL="redis://host/x": want`},
		{"REDIS_URL=redis://host/-1", "", 2, "not the number of a database"},
		{"REDIS_URL=redis://ann@host", "", 2, "user without a password"},
		{"REDIS_URL=redis://ann:secret@host/x", "", 2, `REDIS_URL="redis://xxxxx@host/x"`},
		{"REDIS_URL=redis://ann:secret@host:port", "", 2, "not a URL"},
		{"REDIS_URL=redis://:%zzsecret@host", "", 2, "not a URL"},
		{"REDIS_URL=redis://:se/cret@secret@host/x", "", 2, `REDIS_URL="redis://xxxxx@host/x"`},
		{"REDIS_URL=redis://:12#secret@host", "", 2, "'?' and '#' have no meaning here"},
		{"REDIS_URL=redis://host?password=secret", "", 2, `REDIS_URL="redis://host?xxxxx"`},
		{"REDIS_URL=redis://:secret", "", 2, "not a URL"},
		{"REDIS_URL=secret@host", "", 2, `REDIS_URL="xxxxx@host"`},
		{"", "start", 2, `unknown arguments "start"`},
		{"", "healthcheck now", 2, `unknown arguments "healthcheck now"`},
	} {
		t.Run(tt.env+tt.args, func(t *testing.T) {
			t.Parallel()
			cmd := command(t, []string{"ADDR=127.0.0.1:0", tt.env}, strings.Fields(tt.args)...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			cmd.Run()
			line := stderr.String()
			if status := cmd.ProcessState.ExitCode(); status != tt.status || !strings.Contains(line, tt.says) {
				t.Errorf("status %d, %q; want %d, %q", status, line, tt.status, tt.says)
			}
			if strings.Count(line, "\n") != 1 || !strings.HasSuffix(line, "\n") || strings.Contains(line, "secret") {
				t.Errorf("not one line without a secret: %q", line)
			}
		})
	}
}

// Each setting has the default that the usage states, also when it is empty.
func TestDefaults(t *testing.T) {
	for _, name := range []string{"ADDR", "REDIS_URL", "REDIS_KEY", "REDIS_TIMEOUT", "SHUTDOWN_DELAY"} {
		t.Setenv(name, "")
	}
	s, err := readSettings()
	if err != nil || s != (settings{addr: ":8083", key: "requestcount"}) {
		t.Errorf("got %+v, %v", s, err)
	}
	t.Setenv("REDIS_URL", "redis://host")
	s, err = readSettings()
	if err != nil || s.redis.timeout != time.Second {
		t.Errorf("got %+v, %v", s.redis, err)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	out, err := command(t, nil, "-h").Output()
	if err != nil || string(out) != usage {
		t.Errorf("%v, %q", err, out)
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
		p := startProcess(t, tt.env)
		check := command(t, []string{"ADDR=" + strings.TrimPrefix(p.url, "http://")}, "healthcheck")
		out, _ := check.CombinedOutput()
		if status := check.ProcessState.ExitCode(); status != tt.status || !strings.HasPrefix(string(out), tt.says) {
			t.Errorf("%s: status %d, %q", tt.env, status, out)
		}
		p.Process.Signal(os.Interrupt)
		if status, log := p.wait(); status != 0 {
			t.Errorf("SIGINT: status %d\n%s", status, log)
		}
	}
	none := command(t, []string{"ADDR=127.0.0.1:1"}, "healthcheck")
	if out, _ := none.CombinedOutput(); none.ProcessState.ExitCode() != 1 {
		t.Errorf("without a server: status %d, %q", none.ProcessState.ExitCode(), out)
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
				a, err := ask(http.DefaultClient, p.url)
				if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
					return // the listener has closed
				}
				if err != nil || a.n != a.total {
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
	if resp, body := get(t, "GET", p.url+"/readyz"); resp.StatusCode != 503 || !resp.Close {
		t.Errorf("while stopping: %s %q", resp.Status, body)
	}
	wg.Wait()
	status, log := p.wait()
	if status != 0 || !strings.Contains(log, "msg=stop handled="+strconv.Itoa(len(numbers))+"\n") {
		t.Errorf("status %d after %d answers\n%s", status, len(numbers), log)
	}
	oneTo(t, "the instance", numbers)
	if n := total(t, url, key); n != int64(len(numbers)) {
		t.Errorf("total %d after %d answers", n, len(numbers))
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "SHUTDOWN_DELAY=1h")
	p.Process.Signal(syscall.SIGTERM)
	for {
		if resp, _ := get(t, "GET", p.url+"/readyz"); resp.StatusCode == 503 {
			break
		}
	}
	p.Process.Signal(syscall.SIGTERM)
	if status, log := p.wait(); status == 0 {
		t.Errorf("status 0\n%s", log)
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
		t.Errorf("without Redis: %s", resp.Status)
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
	if want := "start,Redis is down,Redis is up,stopping,stop"; status != 0 || strings.Join(got, ",") != want {
		t.Errorf("status %d, %s; want %s\n%s", status, got, want, log)
	}
	for _, part := range []string{"redis=" + proxy.Addr().String(), "go=go1.", "version=", "cause="} {
		if !strings.Contains(log, part) {
			t.Errorf("no %q in the log:\n%s", part, log)
		}
	}
}

// A server takes half of the processors, or as many as it is told to.
func TestProcessors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  string
		want int
	}{
		{"GOMAXPROCS=", (processors + 1) / 2},
		{"GOMAXPROCS=3", 3},
	} {
		p := startProcess(t, tt.env)
		p.Process.Signal(syscall.SIGTERM)
		if _, log := p.wait(); !strings.Contains(log, fmt.Sprintf("gomaxprocs=%d\n", tt.want)) {
			t.Errorf("%s: want %d\n%s", tt.env, tt.want, log)
		}
	}
}

func TestDeadline(t *testing.T) {
	t.Parallel()
	never, now := time.Time{}, time.Unix(1_000_000_000, 0)
	for _, test := range []struct {
		what      string
		set, want time.Time
		due       bool
	}{
		{"none, none in force", never, never, false},
		{"the first", never, now, true},
		{"the same", now, now, false},
		{"a little later", now, now.Add(time.Second - 1), false},
		{"a second later", now, now.Add(time.Second), true},
		{"earlier", now, now.Add(-1), true},
		{"none, one in force", now, never, true},
	} {
		d := deadline{want: test.want, set: test.set}
		if due := d.due(); due != test.due {
			t.Errorf("%s: due %t", test.what, due)
		}
		if early := d.want.Sub(d.set); early < 0 || early >= time.Second {
			t.Errorf("%s: %v in force for %v", test.what, d.set, d.want)
		}
	}
}

// A client keeps its deadlines, and gives no byte to who only looks out for one.
func TestClient(t *testing.T) {
	t.Parallel()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	peer, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	conn, err := clients{listener}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(peer, "ab"); err != nil {
		t.Fatal(err)
	}

	over, ahead := time.Unix(1, 0), time.Now().Add(time.Minute)
	for _, test := range []struct {
		what     string
		deadline time.Time
		bytes    int
		err      error
	}{
		{"late", over, 2, os.ErrDeadlineExceeded},
		{"a look-out", ahead, 1, os.ErrDeadlineExceeded},
		{"in time", ahead, 2, nil},
		{"late again", over, 2, os.ErrDeadlineExceeded},
	} {
		conn.SetReadDeadline(test.deadline)
		if _, err := io.ReadFull(conn, make([]byte, test.bytes)); !errors.Is(err, test.err) {
			t.Errorf("%s: reading gives %v, want %v", test.what, err, test.err)
		}
		conn.SetWriteDeadline(test.deadline)
		if _, err := conn.Write(make([]byte, 2)); (err != nil) != (test.deadline == over) {
			t.Errorf("%s: writing gives %v", test.what, err)
		}
	}
}

// Slow and malformed clients get what HTTP says and hold nobody up.
func TestBadClients(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	for _, tt := range []struct{ request, status string }{
		{"nonsense\r\n\r\n", "HTTP/1.1 400"},
		{"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 32<<10) + "\r\n\r\n", "HTTP/1.1 431"},
		{"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", "HTTP/1.1 200"},
		{"", ""}, // says nothing
	} {
		nc, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if tt.status == "" {
			continue
		}
		if line := request(nc, tt.request); !strings.HasPrefix(line, tt.status) {
			t.Errorf("%.30q: %q, want %s", tt.request, line, tt.status)
		}
	}
	if _, body := get(t, "GET", p.url); !strings.Contains(body, "This is request 2 to this instance and request 2 to the cluster.") {
		t.Errorf("got %q", body)
	}
}

// Requests over real sockets, by how many connections ask at a time: of
// net/http with an atomic counter, of an instance alone, and of one with a
// Redis. The client allocates nothing, so the allocations are the server's.
func BenchmarkHandler(b *testing.B) {
	bare := func(b *testing.B) http.Handler {
		var n atomic.Int64
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			i := n.Add(1)
			fmt.Fprintf(w, "You are talking to instance host:1.\nThis is request %d to this instance and request %d to the cluster.\n", i, i)
		})
	}
	alone := func(b *testing.B) http.Handler {
		return newHandler("host:1", newCounter("host:1", "requestcount", nil))
	}
	redis := func(b *testing.B) http.Handler {
		needPrograms(b, "redis-server")
		r := mustParse(b, "redis://"+startServer(b, "nopass").addr(), 5*time.Second)
		return newHandler("host:1", newCounter("host:1", "requestcount", r))
	}
	for _, server := range []struct {
		name    string
		handler func(b *testing.B) http.Handler
	}{{"bare", bare}, {"alone", alone}, {"redis", redis}} {
		b.Run(server.name, func(b *testing.B) {
			s := httptest.NewServer(server.handler(b))
			defer s.Close()
			for _, connections := range []int{1, 64, 256} {
				b.Run(strconv.Itoa(connections), func(b *testing.B) {
					inParallel(b, connections, func() func() {
						nc, err := net.Dial("tcp", s.Listener.Addr().String())
						if err != nil {
							b.Fatal(err)
						}
						b.Cleanup(func() { nc.Close() })
						request, answer := []byte(plainGet), make([]byte, 4<<10)
						return func() {
							if _, err := nc.Write(request); err != nil {
								b.Error(err)
							} else if _, err := nc.Read(answer); err != nil {
								b.Error(err)
							}
						}
					})
				})
			}
		})
	}
}
