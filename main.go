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
	"maps"
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
       requestcount healthcheck   ask the server at ADDR whether it is ready: status 0 if so
       requestcount -version      print the version

Settings, by environment variable; empty means unset:
  ADDR            :8083         listen address
  REDIS_URL                     redis://[[user]:password@]host[:port][/db], rediss:// for TLS
  REDIS_KEY       requestcount  key of the total; the ledger is at {REDIS_KEY}:ledger, with braces
  REDIS_TIMEOUT   1s            how long Redis may be away before requests are answered 503
  SHUTDOWN_DELAY  0s            how long to go on serving, not ready, after SIGTERM
`

// The two answers to a request: with the cluster's number, and without it while Redis is down.
const (
	withTotal = "You are talking to instance %s.\n" +
		"This is request %d to this instance and request %d to the cluster.\n"
	withoutTotal = "You are talking to instance %s.\n" +
		"This is request %d to this instance; the cluster count is unavailable.\n"
)

const (
	drainTimeout  = 10 * time.Second       // after SHUTDOWN_DELAY, for telling Redis the rest
	checkTimeout  = time.Second            // for each of a healthcheck's two steps; a probe has 3 s
	connections   = 8                      // to Redis, at most; more are no faster
	syncInterval  = time.Second            // between two syncs of an empty ledger
	entryInterval = 500 * time.Microsecond // added for each entry, as a sync reads them all
	maxInterval   = 3 * time.Second        // 1.5 of these and ReadTimeout are less than drainTimeout
	retryInterval = 500 * time.Millisecond // between two syncs while Redis is down
	maxSyncs      = 10                     // for one batch, before it fails
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
	case "-version", "--version":
		fmt.Println(version)
		return
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, func() {
		time.Sleep(time.Second) // GNU timeout(1) sends its signal twice: the second must not kill
		stop()                  // from now on a signal ends the process at once
	})
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
		return cfg, fmt.Errorf("ADDR: malformed %q: want host:port or :port, such as :8083, "+
			"and an IPv6 address in brackets", cfg.addr)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		return cfg, fmt.Errorf("ADDR: unknown port %q: want 0 to 65535", port)
	}
	cfg.key = getenv("REDIS_KEY", "requestcount")
	if strings.ContainsAny(cfg.key, "{}") {
		return cfg, fmt.Errorf("REDIS_KEY: brace in %q: want a key without braces", cfg.key)
	}
	if cfg.redisTimeout, err = getenvDuration("REDIS_TIMEOUT", "1s", 20*time.Millisecond); err == nil {
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
		return 0, fmt.Errorf("%s: %q: want a number with a unit, such as 500ms or 5s, "+
			"and at least %v", name, value, least)
	}
	return d, nil
}

// run serves until ctx is done, answers what it has begun, and tells Redis all that it has counted.
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
	slog.Info("start", "addr", listener.Addr(), "instance", instance, "redis", cfg.redis,
		"version", version, "go", runtime.Version())

	counter := newCounter(instance, cfg.key, cfg.redis)
	syncCtx, stopSyncs := context.WithCancel(context.Background())
	defer stopSyncs()
	go counter.keepSynced(syncCtx)
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
	server.Shutdown(context.Background()) // the server's limits bound what is under way
	counter.end(drain)
	slog.Info("stop", "handled", counter.status().n)
	return nil
}

// newServer returns a server with limits on slow clients and on large requests.
func newServer(h http.Handler, redisTimeout time.Duration) *http.Server {
	return &http.Server{
		Handler:     h,
		ReadTimeout: drainTimeout / 2, // so a slow client leaves time for telling Redis
		// A request may wait for an earlier one. Each takes up to two timeouts, unless it has to sync.
		WriteTimeout: max(10*time.Second, 4*redisTimeout+time.Second),
		// A load balancer keeps an idle connection for up to 600 s. It must be the one that closes
		// it: a request that crosses the server's close on the way gets a 502,
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
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "ok")
	})
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
		// SetKeepAlivesEnabled(false) would close idle connections at once, and a request that is
		// on its way on one of them would fail.
		w.Header().Set("Connection", "close")
	}
	if err != nil {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, withoutTotal, h.instance, n)
		return
	}
	fmt.Fprintf(w, withTotal, h.instance, n, total)
}

// readyz answers 200 once a sync has succeeded, even while Redis is down: all instances share that
// Redis, so no other one could do better.
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

// metrics answers in the text format of Prometheus, and leaves out what the instance does not know,
// https://prometheus.io/docs/instrumenting/exposition_formats/.
func (h *handler) metrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	metric := func(name, kind, help string, n int64) {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %d\n", name, help, name, kind, name, n)
	}
	s := h.counter.status()
	metric("requestcount_instance_requests_total", "counter",
		"Requests handled by this instance.", s.n)
	if s.notReady == nil {
		metric("requestcount_cluster_requests", "gauge", "Requests handled by all instances, "+
			"as last seen; each instance tells the whole number, so take max(), not sum().", s.total)
	}
	if h.counter.redis != nil {
		up := int64(0)
		if s.down == nil && s.notReady == nil {
			up = 1
		}
		metric("requestcount_redis_up", "gauge",
			"Whether requests are counted in Redis: 1 if so, 0 if not.", up)
	}
}

// healthcheck asks the server at ADDR, on this machine, whether it is ready. It does without
// http.Client, which would add half a megabyte to the binary.
func healthcheck(_ context.Context, cfg config) error {
	nc, err := net.DialTimeout("tcp", cfg.addr, checkTimeout) // no host, or 0.0.0.0, is this machine
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(checkTimeout))
	// An error here shows up when the answer is read.
	io.WriteString(nc, "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
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

// A counter counts the requests to this instance and, through Redis, those to the cluster: each
// exactly once.
//
// Redis holds a ledger: how many requests each connection of each instance has counted. The total
// is the sum of these counts. A connection always tells its whole count, never a difference: told
// again, late or twice, it changes nothing, and of two counts the higher one is right. Each
// instance has a copy of the ledger, synced every one to three seconds. From its copy it gives back
// what Redis has lost.
type counter struct {
	redis   *redisServer  // nil for a cluster of one
	pool    chan *conn    // connections used before; whoever takes one out owns it until it is back
	spare   chan *conn    // connections not needed so far
	syncing chan struct{} // a lock; with a mutex the fake clock of tests would stand still

	mu      sync.Mutex       // guards the rest
	n       int64            // requests counted
	pending *batch           // takes the requests that arrive now
	ledger  map[string]entry // by id; counts only rise: by send after its command, and by sync
	told    time.Time        // when Redis may last have learned something new from here
	syncs   int              // how many have succeeded
	total   int64            // of the cluster, as last seen
	low     bool             // the last sync found a lower total, though Redis lacked nothing
	down    error            // why the last try to count in Redis failed; nil if it succeeded
	since   time.Time        // when Redis went down
}

// A batch is the requests that share one command to Redis.
type batch struct {
	size int64 // grows, under counter.mu, while the batch is pending; fixed once it is sealed

	done  chan struct{} // closed once the fields below are set
	n     int64         // number of its last request in the instance
	total int64         // number of its last request in the cluster, unless err
	err   error
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

// newCounter returns a counter for the named instance that keeps its total at key in Redis, or
// counts alone if redis is nil.
func newCounter(instance, key string, redis *redisServer) *counter {
	c := &counter{
		redis:   redis,
		pool:    make(chan *conn, connections),
		spare:   make(chan *conn, connections),
		syncing: make(chan struct{}, 1),
		ledger:  map[string]entry{},
		pending: newBatch(),
	}
	id := instance + "/" + rand.Text() // so a restarted process has entries of its own
	for i := range connections {
		c.spare <- newConn(redis, key, id+"/"+strconv.Itoa(i+1))
	}
	return c
}

// next counts a request and returns its number in this instance and in the cluster. With an error
// the cluster's number is unknown. The request is counted even so, and Redis is told later.
func (c *counter) next() (instance, cluster int64, err error) {
	c.mu.Lock()
	if c.redis == nil {
		defer c.mu.Unlock()
		c.n++
		c.total = c.n
		return c.n, c.total, nil
	}
	b := c.pending
	b.size++
	place := b.size
	c.mu.Unlock()

	if place == 1 {
		c.send(b)
	}
	<-b.done
	later := b.size - place
	return b.n - later, b.total - later, b.err
}

// send waits for a connection; requests join b meanwhile. Then it seals b, so that the next ones
// join another batch, and has it counted.
func (c *counter) send(b *batch) {
	conn := c.take()
	defer func() { c.pool <- conn }()
	runtime.Gosched() // lets handlers that are ready to run join this batch
	c.mu.Lock()
	c.pending = newBatch()
	c.n += b.size
	b.n = c.n
	b.err = c.down // if Redis is down, a later sync tells it
	count := c.ledger[conn.id].count + b.size
	c.mu.Unlock()

	if b.err == nil {
		b.total, b.err = c.tell(conn, count)
		c.setDown(b.err)
	}
	c.mu.Lock()
	c.ledger[conn.id] = entry{count, b.total} // after an error too
	c.total = max(c.total, b.total)
	c.low = false
	c.told = time.Now()
	c.mu.Unlock()
	close(b.done)
}

// take waits for a connection. Those used before come first: most are dialed and have an entry in
// the ledger.
func (c *counter) take() *conn {
	select {
	case conn := <-c.pool:
		return conn
	default:
	}
	select {
	case conn := <-c.pool:
		return conn
	case conn := <-c.spare:
		return conn
	}
}

// tell has Redis raise the connection's entry to count, and returns the total just after that. If
// Redis has lost data, a sync gives back what this instance knows. Two syncs in a row with nothing
// to give back accept a lower total.
func (c *counter) tell(conn *conn, count int64) (total int64, err error) {
	for range maxSyncs {
		before := c.status()
		total, err = conn.raise(before.total, count)
		if !errors.Is(err, errBehind) {
			break
		}
		c.syncing <- struct{}{}
		now := c.status()
		syncErr := now.down
		if syncErr == nil && now.syncs == before.syncs { // else the sync of another may be enough
			syncErr = c.sync(conn)
		}
		<-c.syncing
		if syncErr != nil {
			return 0, syncErr
		}
	}
	return total, err
}

// setDown records how the last try to count in Redis went, and logs a change. After a failure
// requests are answered 503 at once, until a try succeeds.
func (c *counter) setDown(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err != nil && c.down == nil:
		c.since = time.Now()
		slog.Warn("cannot count in Redis", "redis", c.redis, "cause", err)
	case err == nil && c.down != nil:
		slog.Info("counting in Redis again", "redis", c.redis,
			"after", time.Since(c.since).Round(time.Millisecond))
	}
	c.down = err
	c.redis.down.Store(err != nil)
	if err != nil { // the failed command may have reached Redis only now
		c.told = time.Now()
	}
}

// keepSynced syncs at each interval, and twice a second while Redis is down, until ctx is done.
func (c *counter) keepSynced(ctx context.Context) {
	if c.redis == nil {
		return
	}
	for next := time.Now(); ctx.Err() == nil; {
		if c.status().down != nil || !time.Now().Before(next) {
			conn := c.take()
			c.syncing <- struct{}{}
			c.sync(conn)
			<-c.syncing
			c.pool <- conn
			next = time.Now().Add(c.interval())
		}
		select {
		case <-time.After(min(retryInterval, time.Until(next))): // a batch may find Redis down
		case <-ctx.Done():
		}
	}
}

// interval returns the time between two syncs, longer for a long ledger.
func (c *counter) interval() time.Duration {
	return min(syncInterval+time.Duration(c.status().entries)*entryInterval, maxInterval)
}

// sync gives both ledgers, the one here and that in Redis, the higher count of each entry.
func (c *counter) sync(conn *conn) error {
	known := c.status().total
	// The total is read before the entries. If Redis loses data in between, some entries are lacking,
	// and then c.total keeps its value. It does, too, the first time that the total is lower but no
	// entry is lacking: others may have given them back in between.
	total, err := conn.total()
	c.setDown(err)
	if err != nil {
		return err
	}
	c.mu.Lock()
	ours := maps.Clone(c.ledger) // before the entries are read: what is counted later is no loss
	c.mu.Unlock()
	theirs, err := conn.entries()
	lacking, requests := map[string]entry{}, int64(0)
	if err == nil {
		for id, e := range ours {
			if more := e.count - theirs[id].count; more > 0 {
				lacking[id] = e
				requests += more
			}
		}
		err = conn.restore(lacking)
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || len(lacking) > 0 {
		c.told = time.Now()
	}
	if err != nil {
		slog.Warn("cannot sync the ledger with Redis", "redis", c.redis, "cause", err)
		return err
	}
	for id, e := range theirs {
		if e.count > c.ledger[id].count {
			c.ledger[id] = e
		}
	}
	if len(lacking) > 0 {
		slog.Info("told Redis what it lacked", "redis", c.redis,
			"requests", requests, "entries", len(lacking))
	}
	low := len(lacking) == 0 && total < known
	if len(lacking) == 0 && c.total == known && (!low || c.low) { // else total is out of date
		c.total = total
	}
	c.low = low
	c.syncs++
	return nil
}

// end tells Redis all that this instance knows. Then it waits for 1.5 intervals, in which each
// other instance reads it and can give it back from then on. While Redis is down it tries until ctx
// is done. It keeps all connections, so that nothing is counted after it.
func (c *counter) end(ctx context.Context) {
	conn := c.take()
	defer conn.close()
	for range cap(c.pool) - 1 {
		c.take().close()
	}
	for logged := false; c.status().entries > 0; logged = true {
		err := c.sync(conn) // without the lock: nobody else has a connection
		wait := time.Until(c.status().told.Add(c.interval() * 3 / 2))
		if err == nil && wait <= 0 {
			return
		}
		if !logged {
			slog.Info("waiting until Redis and the other instances know what was counted here")
		}
		select {
		case <-time.After(min(wait, retryInterval)): // Redis may lose data meanwhile
		case <-ctx.Done():
			if err != nil {
				slog.Warn("Redis may not know all that this instance has counted", "cause", err)
			}
			return
		}
	}
}

// A status is what a counter knows of itself and of the cluster.
type status struct {
	n, total int64     // requests handled here, and by all
	entries  int       // in the ledger
	syncs    int       // as in counter
	told     time.Time // as in counter
	down     error     // as in counter
	notReady error     // nil once there was a sync
}

func (c *counter) status() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := status{n: c.n, total: c.total, entries: len(c.ledger), syncs: c.syncs,
		told: c.told, down: c.down}
	if c.redis != nil && c.syncs == 0 {
		s.notReady = cmp.Or(c.down, errors.New("no sync with Redis yet"))
	}
	return s
}
