// Requestcount is a web server that counts the requests it handles and the
// requests that all running instances of it handle together, and says so in
// plain text. Redis holds the cluster's number; without Redis the instance is
// a cluster of one.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const usage = `Usage: requestcount               count requests and answer them
       requestcount healthcheck   ask the server at ADDR whether it is ready: status 0 or 1
       requestcount -h            print this

Settings, by environment variable; empty means unset:
  ADDR            :8083         listen address
  REDIS_URL                     redis://[[user]:password@]host[:port][/db], rediss:// for TLS;
                                none: a cluster of one
  REDIS_KEY       requestcount  key of the total; that of the ledger is {key}:instances
  REDIS_TIMEOUT   1s            how long a request may wait for Redis; above zero
  SHUTDOWN_DELAY  0s            how long to go on serving, not ready, after SIGTERM
`

// The limits on a client, so that a slow or a large one holds nobody up.
const (
	headerTimeout  = 5 * time.Second
	requestTimeout = 10 * time.Second
	answerTimeout  = 10 * time.Second
	idleTimeout    = 2 * time.Minute
	maxHeader      = 16 << 10 // bytes
	drainTimeout   = 10 * time.Second
)

// checkTimeout bounds each step of a healthcheck, below the 3 s that a probe may take.
const checkTimeout = time.Second

// version is stamped by the build, with -ldflags "-X main.version=…".
var version string

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	run := serve
	switch args := strings.Join(os.Args[1:], " "); args {
	case "":
	case "healthcheck":
		run = healthcheck
	case "-h", "-help", "--help":
		fmt.Print(usage)
		return
	default:
		exit(2, fmt.Errorf("unknown arguments %q; see requestcount -h", args))
	}
	s, err := readSettings()
	if err != nil {
		exit(2, err)
	}
	if err := run(s); err != nil {
		exit(1, err)
	}
}

// exit ends the process with a status after one line that says why.
func exit(status int, err error) {
	fmt.Fprintln(os.Stderr, "requestcount:", err)
	os.Exit(status)
}

// settings are what the environment asks for.
type settings struct {
	addr  string
	key   string
	redis *redis        // nil for a cluster of one
	delay time.Duration // between SIGTERM and the end of service
}

// readSettings reads the environment. An error names the setting, its value
// without any password, and what is accepted.
func readSettings() (s settings, err error) {
	s.addr = getenv("ADDR", ":8083")
	if _, port, err := net.SplitHostPort(s.addr); err != nil || port == "" {
		return s, fmt.Errorf("ADDR=%q: want host:port or :port, such as :8083", s.addr)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		return s, fmt.Errorf("ADDR=%q: want a port from 0 to 65535", s.addr)
	}
	s.key = getenv("REDIS_KEY", "requestcount")
	if strings.ContainsAny(s.key, "{}") || strings.TrimSpace(s.key) == "" {
		return s, fmt.Errorf("REDIS_KEY=%q: want a key that is not blank and has no brace in it", s.key)
	}
	timeout, err := getenvDuration("REDIS_TIMEOUT", "1s")
	if err != nil || timeout <= 0 {
		return s, fmt.Errorf("REDIS_TIMEOUT=%q: want a duration above zero, such as 500ms or 1s", os.Getenv("REDIS_TIMEOUT"))
	}
	s.delay, err = getenvDuration("SHUTDOWN_DELAY", "0s")
	if err != nil || s.delay < 0 {
		return s, fmt.Errorf("SHUTDOWN_DELAY=%q: want a duration, not negative, such as 0s or 5s", os.Getenv("SHUTDOWN_DELAY"))
	}
	if raw := os.Getenv("REDIS_URL"); raw != "" {
		s.redis, err = parseRedisURL(raw)
		if err != nil {
			return s, fmt.Errorf("REDIS_URL=%q: want redis:// or rediss://[[user]:password@]host[:port][/db]: %w", redact(raw), err)
		}
		s.redis.timeout = timeout
	}
	return s, nil
}

func getenv(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func getenvDuration(name, otherwise string) (time.Duration, error) {
	return time.ParseDuration(getenv(name, otherwise))
}

// redact returns a URL, however malformed, without what may be a password:
// all between the scheme and the last '@' or, where the '@' was forgotten,
// all behind the host's first colon that is not a port; and any query.
func redact(raw string) string {
	scheme, rest, ok := strings.Cut(raw, "://")
	if !ok {
		scheme, rest = "", raw
	} else {
		scheme += "://"
	}
	if at := strings.LastIndex(rest, "@"); at >= 0 {
		return scheme + "xxxxx" + rest[at:]
	}
	if host, port, ok := strings.Cut(rest, ":"); ok && !strings.HasPrefix(rest, "[") {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil || host == "" {
			return scheme + host + ":xxxxx"
		}
	}
	if i := strings.IndexAny(rest, "?#"); i >= 0 {
		return scheme + rest[:i+1] + "xxxxx"
	}
	return scheme + rest
}

// serve runs the server until SIGTERM or SIGINT; a second signal ends it at once.
func serve(s settings) error {
	if os.Getenv("GOMAXPROCS") == "" {
		// Redis and the clients often share the machine, and requests on fewer
		// processors gather in larger flights: of two cores, using one gave 10 %
		// more requests for 20 % less CPU each.
		runtime.GOMAXPROCS((runtime.GOMAXPROCS(0) + 1) / 2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	listener, err := net.Listen("tcp", s.addr)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	instance := host + ":" + strconv.Itoa(port)
	redisAddr, writeTimeout := "none: a cluster of one", answerTimeout
	if s.redis != nil {
		redisAddr = s.redis.addr
		// A request may wait for the flight before its own and then for its own.
		writeTimeout = max(writeTimeout, 2*s.redis.timeout+time.Second)
	}
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		version = info.Main.Version
	}
	slog.Info("start", "addr", listener.Addr(), "instance", instance, "redis", redisAddr,
		"version", version, "go", runtime.Version(), "gomaxprocs", runtime.GOMAXPROCS(0))

	counter := newCounter(instance, s.key, s.redis)
	running, end := context.WithCancel(context.Background())
	defer end()
	var counting sync.WaitGroup
	counting.Go(func() { counter.run(running) })

	h := newHandler(instance, counter)
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(clients{listener.(*net.TCPListener)}) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}

	stop()
	h.stopping.Store(true)
	slog.Info("stopping", "delay", s.delay)
	time.Sleep(s.delay)
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		slog.Warn("some requests took too long to be answered", "cause", err)
	}
	end()
	counting.Wait()
	slog.Info("stop", "handled", counter.stats().instance)
	return nil
}

// clients is a listener whose connections spare net/http a tenth of its work.
type clients struct{ *net.TCPListener }

func (l clients) Accept() (net.Conn, error) {
	conn, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return &client{TCPConn: conn}, nil
}

// A client is a connection to one. Of the deadlines that net/http sets, six for
// a request, it puts in force only those that the next read or write needs.
type client struct {
	*net.TCPConn
	reading, writing deadline
}

func (c *client) SetReadDeadline(t time.Time) error {
	c.reading.want = t
	return nil
}

func (c *client) SetWriteDeadline(t time.Time) error {
	c.writing.want = t
	return nil
}

// Read reads what has arrived, but no single byte: that is how net/http looks
// out for a client that leaves while its handler waits. No handler here asks.
func (c *client) Read(b []byte) (int, error) {
	if len(b) == 1 {
		return 0, os.ErrDeadlineExceeded
	}
	if c.reading.due() {
		c.TCPConn.SetReadDeadline(c.reading.set)
	}
	runtime.Gosched() // meanwhile the next request may come: to be read at once is cheaper than to be waited for
	return c.TCPConn.Read(b)
}

func (c *client) Write(b []byte) (int, error) {
	if c.writing.due() {
		c.TCPConn.SetWriteDeadline(c.writing.set)
	}
	return c.TCPConn.Write(b)
}

// A deadline is one that was asked for and the one that is in force, which may
// be up to a second earlier.
type deadline struct{ want, set time.Time }

// due puts d in force, and reports so, unless the one in force will do.
func (d *deadline) due() bool {
	if early := d.want.Sub(d.set); 0 <= early && early < time.Second {
		return false
	}
	d.set = d.want
	return true
}

// healthcheck asks the server at ADDR, on this machine, whether it is ready.
// It does without http.Client, which would add half a megabyte to the binary.
func healthcheck(s settings) error {
	conn, err := net.DialTimeout("tcp", s.addr, checkTimeout) // no host, or 0.0.0.0, is this machine
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(checkTimeout))
	if _, err := io.WriteString(conn, "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		reason, _ := io.ReadAll(io.LimitReader(resp.Body, maxLine))
		return errors.New(strings.TrimSpace(string(reason)))
	}
	return nil
}

// A handler answers the requests to one instance.
type handler struct {
	mux      *http.ServeMux
	counter  *counter
	greeting string
	stopping atomic.Bool
}

func newHandler(instance string, c *counter) *handler {
	h := &handler{
		mux:      http.NewServeMux(),
		counter:  c,
		greeting: "You are talking to instance " + instance + ".\nThis is request ",
	}
	h.mux.HandleFunc("GET /{$}", h.count)
	h.mux.HandleFunc("GET /healthz", h.healthz)
	h.mux.HandleFunc("GET /readyz", h.readyz)
	h.mux.HandleFunc("GET /metrics", h.metrics)
	return h
}

// ServeHTTP has clients let go of their connections while the instance is
// stopping, so that none sends a request into one that closes.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	h.mux.ServeHTTP(w, r)
}

// Header values that are set as they are, to spare each answer their allocation.
var (
	plainText = []string{"text/plain; charset=utf-8"}
	noStore   = []string{"no-store"}
)

// count counts the request and tells its numbers.
func (h *handler) count(w http.ResponseWriter, r *http.Request) {
	n, total, err := h.counter.next()
	b := append(make([]byte, 0, 256), h.greeting...)
	b = strconv.AppendInt(b, n, 10)
	if err == nil {
		b = append(b, " to this instance and request "...)
		b = strconv.AppendInt(b, total, 10)
		b = append(b, " to the cluster.\n"...)
	} else {
		b = append(b, " to this instance; the cluster count is unavailable.\n"...)
	}
	header := w.Header()
	header["Content-Type"] = plainText
	header["Cache-Control"] = noStore
	if err != nil {
		header.Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	w.Write(b)
}

func (h *handler) healthz(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintln(w, "ok")
}

// readyz stays ready while Redis is down: every instance shares that Redis, so
// no other could take the requests.
func (h *handler) readyz(w http.ResponseWriter, r *http.Request) {
	if h.stopping.Load() {
		http.Error(w, "not ready: stopping", http.StatusServiceUnavailable)
	} else if err := h.counter.ready(); err != nil {
		http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
	} else {
		fmt.Fprintln(w, "ready")
	}
}

// metrics answers in the text format of Prometheus,
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func (h *handler) metrics(w http.ResponseWriter, r *http.Request) {
	s := h.counter.stats()
	up := 0
	if s.up {
		up = 1
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintf(w, `# HELP requestcount_instance_requests_total Requests handled by this instance.
# TYPE requestcount_instance_requests_total counter
requestcount_instance_requests_total %d
# HELP requestcount_cluster_requests_total Requests handled by all instances, as last seen in Redis.
# TYPE requestcount_cluster_requests_total counter
requestcount_cluster_requests_total %d
# HELP requestcount_redis_up Whether Redis answered the last time: 1 if so, 0 if not or if none is set.
# TYPE requestcount_redis_up gauge
requestcount_redis_up %d
`, s.instance, s.cluster, up)
}
