// Requestcount is a web server that counts the requests it handles and the
// requests that all running instances of it handle together, and says so in
// plain text. Redis holds the cluster's number; without Redis the instance is
// a cluster of one.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const usage = `Usage: requestcount               count requests and answer them
       requestcount healthcheck   ask the server at ADDR whether it is ready: status 0 or 1

Settings, by environment variable; empty means unset:
  ADDR            :8083         listen address
  REDIS_URL                     redis://[[user]:password@]host[:port][/db], rediss:// for TLS
  REDIS_KEY       requestcount  key of the total; {key}:instances and {key}:ended go with it
  REDIS_TIMEOUT   1s            how long a command to Redis may take, each attempt half of it
  SHUTDOWN_DELAY  0s            how long to go on serving, not ready, after SIGTERM
`

// The two answers to a counted request: with the cluster's number, and without
// it while Redis is down.
const (
	countedText   = "You are talking to instance %s.\nThis is request %d to this instance and request %d to the cluster.\n"
	uncountedText = "You are talking to instance %s.\nThis is request %d to this instance; the cluster count is unavailable.\n"
)

const (
	drainTimeout      = 10 * time.Second          // for the last answers, and for telling Redis of them
	checkTimeout      = time.Second               // for each step of a healthcheck, below the 3 s of a probe
	connections       = 8                         // to Redis; more bring nothing, even with a network between
	heartbeatInterval = time.Second               // between heartbeats; the longest pause while Redis is down
	downInterval      = 100 * time.Millisecond    // the first pause while Redis is down; doubles from there
	learnInterval     = 3 * heartbeatInterval / 2 // enough for each instance to have a heartbeat
)

// version is stamped by the build, with -ldflags "-X main.version=…".
var version = "dev"

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	command := run
	switch args := strings.Join(os.Args[1:], " "); args {
	case "":
	case "healthcheck":
		command = healthcheck
	case "-h", "-help", "--help":
		fmt.Print(usage)
		return
	default:
		exit(2, fmt.Errorf("unknown arguments %q: see requestcount -h", args))
	}
	cfg, err := loadConfig()
	if err != nil {
		exit(2, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals
		exit(1, errors.New("ended at once by a second signal"))
	}()
	if err := command(ctx, cfg); err != nil {
		exit(1, err)
	}
}

// exit ends the process with a status after one line that says why.
func exit(status int, err error) {
	fmt.Fprintln(os.Stderr, "requestcount:", err)
	os.Exit(status)
}

type config struct {
	addr, key                   string
	redis                       *redisServer // nil for a cluster of one
	redisTimeout, shutdownDelay time.Duration
}

// loadConfig reads the environment. Its errors name the setting, what is wrong
// with it and what would be right, and never a part of REDIS_URL that may be secret.
func loadConfig() (cfg config, err error) {
	cfg.addr = getenv("ADDR", ":8083")
	if _, port, err := net.SplitHostPort(cfg.addr); err != nil || port == "" {
		return cfg, fmt.Errorf("ADDR: malformed %q: want host:port or :port, such as :8083, and an IPv6 address in brackets", cfg.addr)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		return cfg, fmt.Errorf("ADDR: unknown port %q: want 0 to 65535", port)
	}
	cfg.key = getenv("REDIS_KEY", "requestcount")
	if strings.ContainsAny(cfg.key, "{}") {
		return cfg, fmt.Errorf("REDIS_KEY: brace in %q: want a key without braces", cfg.key)
	}
	if cfg.redisTimeout, err = getenvDuration("REDIS_TIMEOUT", "1s", time.Millisecond); err == nil {
		cfg.shutdownDelay, err = getenvDuration("SHUTDOWN_DELAY", "0s", 0)
	}
	if err != nil {
		return cfg, err
	}
	if rawURL := getenv("REDIS_URL", ""); rawURL != "" {
		if cfg.redis, err = parseRedisURL(rawURL, cfg.redisTimeout); err != nil {
			return cfg, fmt.Errorf("REDIS_URL: %w", err)
		}
	}
	return cfg, nil
}

// getenv returns a setting without white space around it: a Secret made by echo
// ends in a newline.
func getenv(name, fallback string) string {
	return cmp.Or(strings.TrimSpace(os.Getenv(name)), fallback)
}

func getenvDuration(name, fallback string, least time.Duration) (time.Duration, error) {
	value := getenv(name, fallback)
	d, err := time.ParseDuration(value)
	if err != nil || d < least {
		return 0, fmt.Errorf("%s: %q: want a number with a unit, such as 500ms or 5s, and at least %v", name, value, least)
	}
	return d, nil
}

// run serves until ctx is done, drains, and notes in Redis that the instance has ended.
func run(ctx context.Context, cfg config) error {
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	instance := host + ":" + strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	slog.Info("start", "addr", listener.Addr(), "instance", instance, "redis", cfg.redis, "version", version, "go", runtime.Version())

	counter := newCounter(instance, cfg.key, cfg.redis)
	go counter.run(context.Background()) // until end has taken all connections, for good
	h := &handler{counter: counter, instance: instance}
	server := newServer(h.routes(), cfg.redisTimeout)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}

	h.stopping.Store(true)
	slog.Info("stopping", "delay", cfg.shutdownDelay)
	time.Sleep(cfg.shutdownDelay)
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		slog.Warn("some requests took too long to be answered", "cause", err)
		server.Close()
	}
	counter.end(drain)
	slog.Info("stop", "handled", counter.status().n)
	return nil
}

// newServer returns a server with limits, so that a slow client or a large request holds nobody up.
func newServer(h http.Handler, redisTimeout time.Duration) *http.Server {
	return &http.Server{
		Handler: h,
		// Half of drainTimeout: a slow client leaves time for telling Redis at the end.
		ReadTimeout: 5 * time.Second,
		// A request may wait for a connection to Redis, and then for the reply.
		WriteTimeout: max(10*time.Second, 2*redisTimeout+time.Second),
		// A load balancer keeps an idle connection for up to 600 s. It must be the one that
		// closes: a request that crosses the server's close on the way gets a 502,
		// https://cloud.google.com/load-balancing/docs/https#timeouts_and_retries.
		IdleTimeout:    620 * time.Second,
		MaxHeaderBytes: 16 << 10,
	}
}

// A handler answers the requests to one instance.
type handler struct {
	counter  *counter
	instance string
	stopping atomic.Bool
}

func (h *handler) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.count)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", h.readyz)
	mux.HandleFunc("GET /metrics", h.metrics)
	return mux
}

// count counts the request and tells its numbers.
func (h *handler) count(w http.ResponseWriter, r *http.Request) {
	n, total, err := h.counter.next()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if h.stopping.Load() {
		// SetKeepAlivesEnabled(false) would close idle connections at once, and a
		// request that is on its way on one of them would fail.
		w.Header().Set("Connection", "close")
	}
	if err != nil {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, uncountedText, h.instance, n)
		return
	}
	fmt.Fprintf(w, countedText, h.instance, n, total)
}

// readyz stays ready while Redis is down: every instance shares that Redis, so
// no other could take the requests.
func (h *handler) readyz(w http.ResponseWriter, r *http.Request) {
	notReady := h.counter.status().notReady
	if h.stopping.Load() {
		notReady = errors.New("stopping")
	}
	if notReady != nil {
		http.Error(w, "not ready: "+notReady.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ready")
}

// metrics answers in the text format of Prometheus,
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func (h *handler) metrics(w http.ResponseWriter, r *http.Request) {
	s := h.counter.status()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintf(w, `# HELP requestcount_instance_requests_total Requests handled by this instance.
# TYPE requestcount_instance_requests_total counter
requestcount_instance_requests_total %d
# HELP requestcount_cluster_requests Requests handled by all instances, as this one last saw it; each tells the whole number, so take max(), not sum().
# TYPE requestcount_cluster_requests gauge
requestcount_cluster_requests %d
# HELP requestcount_redis_up Whether Redis answered the last time: 1 if so, 0 if not or if none is set.
# TYPE requestcount_redis_up gauge
requestcount_redis_up %d
`, s.n, s.total, map[bool]int{true: 1}[s.up])
}

// healthcheck asks the server at ADDR, on this machine, whether it is ready.
// It does without http.Client, which would add half a megabyte to the binary.
func healthcheck(_ context.Context, cfg config) error {
	nc, err := net.DialTimeout("tcp", cfg.addr, checkTimeout) // no host, or 0.0.0.0, is this machine
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(checkTimeout))
	io.WriteString(nc, "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") // if this fails, so does the reading
	resp, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	reason, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(strings.TrimSpace(string(reason)))
	}
	return err
}

// A counter numbers the requests of this instance and, through Redis, those of
// the cluster: each exactly once.
type counter struct {
	id    string       // this process in the ledger: host:port/RANDOM
	redis *redisServer // nil for a cluster of one
	pool  chan *conn   // idle connections; taking one out is the right to send
	wake  *time.Timer  // fires when the next heartbeat is due

	ended    map[string]string // count of each ended instance, by id; used by heartbeats only, then by end only
	shareErr error             // why the last heartbeat could not share those; nil if it did

	mu      sync.Mutex // guards the rest
	n       int64      // requests counted
	owed    int64      // those of n that no connection has been asked to add yet
	pending *batch     // takes the requests that arrive now
	total   int64      // of the cluster, as last seen
	isReady bool       // Redis has answered once
	down    error      // why Redis is down; nil while it answers
	outages int        // grows where idle connections may be dead: Redis went down, or one was silent
}

// A batch is the requests that share one command to Redis.
type batch struct {
	size int64 // requests in it; grows until the batch is sealed

	done  chan struct{} // closed once the fields below are set
	n     int64         // number of its last request in the instance
	total int64         // number of its last request in the cluster, unless err
	err   error
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

// newCounter returns a counter for the named instance that keeps its total at
// key in Redis, or counts alone if redis is nil.
func newCounter(instance, key string, redis *redisServer) *counter {
	c := &counter{
		id:      instance + "/" + rand.Text(), // a restarted process is another one
		redis:   redis,
		wake:    time.NewTimer(0),
		ended:   map[string]string{},
		pending: newBatch(),
	}
	if redis != nil {
		c.pool = make(chan *conn, connections)
		for i := range connections {
			c.pool <- newConn(redis, key, c.id+"/"+strconv.Itoa(i+1))
		}
	}
	return c
}

// next counts a request and returns its number in this instance and in the
// cluster. With an error the cluster's number is unknown; the request is
// counted all the same, by a later command.
func (c *counter) next() (instance, cluster int64, err error) {
	c.mu.Lock()
	if c.redis == nil || c.down != nil {
		defer c.mu.Unlock()
		c.n++
		c.owed++
		return c.n, c.n, c.down
	}
	b := c.pending
	b.size++
	place := b.size
	c.mu.Unlock()

	if place == 1 {
		c.send(b)
	}
	<-b.done
	after := b.size - place
	return b.n - after, b.total - after, b.err
}

// send waits for a connection, seals b, the pending batch, and sends it.
func (c *counter) send(b *batch) {
	conn := <-c.pool
	runtime.Gosched() // handlers that are ready to run join the batch
	c.mu.Lock()
	c.pending = newBatch()
	c.n += b.size
	b.n, b.err = c.n, c.down
	if b.err != nil {
		c.owed += b.size
	}
	c.mu.Unlock()

	if b.err == nil {
		b.total, b.err = c.add(conn, b.size)
	}
	close(b.done)
	c.pool <- conn
}

// add adds n and what is owed to the cluster's total, and returns and notes what
// came of it. What is owed gets the numbers below those of the n.
func (c *counter) add(conn *conn, n int64) (int64, error) {
	c.mu.Lock()
	n, c.owed = n+c.owed, 0
	once := c.down != nil
	stale := conn.outages != c.outages // idle since an outage: it may be dead
	conn.outages = c.outages
	c.mu.Unlock()
	if stale {
		conn.close()
	}

	total, err := conn.incrBy(n, once)
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn.wasSilent { // so may be all the others
		c.outages++
		conn.outages = c.outages
	}
	switch {
	case err != nil && c.down == nil:
		slog.Warn("Redis is down", "redis", c.redis.addr, "cause", err)
		c.outages++
		c.wake.Reset(0)
	case err == nil && (c.down != nil || !c.isReady):
		slog.Info("Redis is up", "redis", c.redis.addr)
	}
	c.down = err
	if err == nil {
		c.isReady, c.total = true, total
	}
	return total, err
}

// run sends a heartbeat each second, and while Redis is down after pauses that
// double up to a second, until ctx is done.
func (c *counter) run(ctx context.Context) {
	for retry := downInterval; ; {
		select {
		case <-c.wake.C:
		case <-ctx.Done():
			return
		}
		c.wake.Reset(heartbeatInterval)
		if c.heartbeat() == nil {
			retry = downInterval
		} else {
			c.wake.Reset(retry)
			retry = min(2*retry, heartbeatInterval)
		}
	}
}

// heartbeat sends each connection's count again, which restores what Redis has
// forgotten. It stops at the first failure; while Redis is down that is a single attempt.
func (c *counter) heartbeat() error {
	for i := range cap(c.pool) {
		conn := <-c.pool
		_, err := c.add(conn, 0)
		if err == nil && i == cap(c.pool)-1 { // after all counts: it may take a while
			c.share(conn)
		}
		c.pool <- conn
		if err != nil {
			return err
		}
	}
	return nil
}

// share exchanges with Redis which instances have ended, and logs once if it cannot.
func (c *counter) share(conn *conn) {
	_, err := conn.shareEnded(c.ended)
	if err != nil && c.shareErr == nil {
		slog.Warn("the counts of ended instances are not shared", "cause", err)
	}
	c.shareErr = err
}

// end notes in Redis all that this instance has counted, for the time after it,
// and waits until the others have learned of that: if Redis forgets it before,
// nobody else knows. While Redis is away it tries until ctx is done; what is
// under way then may take three times REDIS_TIMEOUT longer.
func (c *counter) end(ctx context.Context) {
	if c.redis == nil {
		return
	}
	var conn *conn
	told := int64(0)        // what Redis has answered to have noted
	for range cap(c.pool) { // all of them, for good: nothing else is sent any more
		conn = <-c.pool
		conn.close() // it may have died in silence
		told += conn.noted
	}
	defer conn.close()
	n := c.status().n
	c.ended[c.id] = strconv.FormatInt(n, 10)
	for pause := downInterval; ; {
		conn.shared = false // compare all
		news, err := conn.shareEnded(c.ended)
		switch {
		case n == 0 && (err == nil || len(c.ended) == 1):
			return // there is nothing that the others would have to learn
		case err != nil:
			pause = downInterval
		case pause == learnInterval && news == 0:
			return // the others have had their heartbeat, and Redis has not forgotten
		default:
			told, pause = n, learnInterval
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if err != nil {
				slog.Warn("Redis may not remember what this instance has counted", "untold", n-told, "cause", err)
			}
			return
		}
	}
}

// A status is what probes and metrics are told, from the last result.
type status struct {
	n, total int64 // requests handled here, and by all as last seen
	up       bool  // Redis answered the last time
	notReady error // nil once Redis has answered
}

func (c *counter) status() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.redis == nil:
		return status{n: c.n, total: c.n}
	case c.isReady:
		return status{n: c.n, total: c.total, up: c.down == nil}
	}
	return status{n: c.n, notReady: cmp.Or(c.down, errors.New("no answer from Redis yet"))}
}
