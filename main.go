// Requestcount is a web server that counts the requests it handles and the
// requests that all running instances of it handle together, and says so in
// plain text. Redis holds the cluster's number; without REDIS_URL the instance is
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
  REDIS_KEY       requestcount  key of the ledger, a hash
  REDIS_TIMEOUT   1s            how long Redis may be away before requests are answered 503;
                                20ms or more
  SHUTDOWN_DELAY  0s            how long to go on serving, not ready, when told to stop
`

// The two answers to a request: with the cluster's number, and without it while Redis is down.
const (
	withTotal = "You are talking to instance %s.\n" +
		"This is request %d to this instance and request %d to the cluster.\n"
	withoutTotal = "You are talking to instance %s.\n" +
		"This is request %d to this instance; the cluster count is unavailable.\n"
)

const (
	readTimeout   = 5 * time.Second        // for a client to send a request
	drainTimeout  = 10 * time.Second       // after the last answer, to tell Redis and the others
	checkTimeout  = time.Second            // for each of a healthcheck's two steps
	connections   = 8                      // to Redis, for counting; more are no faster
	lookInterval  = 250 * time.Millisecond // between two looks at Redis
	minExchanges  = 6                      // in a new epoch, one at each look, before it is entered
	epochWait     = minExchanges * lookInterval
	retryInterval = 100 * time.Millisecond // between two tries of a request meanwhile
	entryInterval = 500 * time.Microsecond // between two exchanges, for each entry of the ledger
	maxInterval   = 3 * time.Second        // between two exchanges, however long it is
)

// version is stamped by the build, with -ldflags "-X main.version=…".
var version = "dev"

func main() {
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads any more must not end the service
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
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup(1) has it
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
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
	settings := []string{"ADDR", "REDIS_URL", "REDIS_KEY", "REDIS_TIMEOUT", "SHUTDOWN_DELAY"}
	for _, name := range settings {
		if value := getenv(name, ""); value != "" && strings.ContainsAny(value[:1], `"'`) &&
			value[0] == value[len(value)-1] {
			return cfg, fmt.Errorf("%s: quotes around the value: want none; "+
				"docker run --env-file takes them for a part of it", name)
		}
	}
	cfg.addr = getenv("ADDR", ":8083")
	if _, port, err := net.SplitHostPort(cfg.addr); err != nil || port == "" {
		return cfg, fmt.Errorf("ADDR: malformed %q: want host:port or :port, such as :8083, "+
			"and an IPv6 address in brackets", cfg.addr)
	} else if _, err := net.LookupPort("tcp", port); err != nil {
		return cfg, fmt.Errorf("ADDR: unknown port %q: want 0 to 65535", port)
	}
	cfg.key = getenv("REDIS_KEY", "requestcount")
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
	keepCtx, stopKeeping := context.WithCancel(context.Background())
	defer stopKeeping()
	var keeping sync.WaitGroup
	keeping.Go(func() { counter.keep(keepCtx) })
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
	server.Shutdown(context.Background()) // keep goes on: a request may wait for an epoch
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	stopKeeping()
	keeping.Wait()
	counter.end(drain)
	slog.Info("stop", "handled", counter.current().n)
	return nil
}

// newServer returns a server with limits on slow clients and on large requests.
func newServer(h http.Handler, redisTimeout time.Duration) *http.Server {
	var unused sync.Map // connections without a request so far; browsers open one in reserve
	s := &http.Server{
		Handler:      h,
		ReadTimeout:  readTimeout,
		WriteTimeout: maxWait(redisTimeout) + 2*redisTimeout + time.Second,
		// A load balancer keeps an idle connection for up to 600 s. It must be the one that closes
		// it: a request that crosses the server's close on the way gets a 502,
		// https://cloud.google.com/load-balancing/docs/https#timeouts_and_retries.
		IdleTimeout:    620 * time.Second,
		MaxHeaderBytes: 16 << 10,
		ConnState: func(nc net.Conn, state http.ConnState) {
			if state == http.StateNew {
				unused.Store(nc, nil)
			} else {
				unused.Delete(nc)
			}
		},
	}
	s.RegisterOnShutdown(func() { // Shutdown would wait 5 s for these
		time.Sleep(100 * time.Millisecond) // a request may be on its way
		unused.Range(func(nc, _ any) bool { nc.(net.Conn).Close(); return true })
	})
	return s
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
		// SetKeepAlivesEnabled(false) would close idle connections now, before the delay, and a
		// request that is on its way on one of them would fail.
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

// readyz answers 200 from the first epoch on, also while Redis is down: all instances share that
// Redis, so no other one could do better.
func (h *handler) readyz(w http.ResponseWriter, r *http.Request) {
	notReady := h.counter.current().notReady
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
	s := h.counter.current()
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
// Redis holds a ledger. Each connection that has counted has an entry there, which says how far.
// Four things are always true of it:
//   - The total is the sum of all counts, plus what somebody has set by hand since the last loss.
//   - A count only rises, so of two the higher one is right. It can be told again, late or twice.
//   - An entry holds the total that a command reached by raising it, so the same command has the
//     same answer when it is sent again.
//   - Only who holds a connection counts in its entry. Others restore what it has counted.
//
// Each instance keeps a copy of the entries. The ledger has an epoch, a random name, which lasts
// until Redis loses data. Then four things happen:
//   - The next one begins: the first run of the script, whoever sends it, gives it its name.
//   - Each instance follows: it does not count, and at each look restores what Redis lacks.
//   - It enters, that is counts again, six looks after it has first seen that epoch, and after
//     others have last added entries. By then all have restored what they knew.
//   - Whoever enters marks it as open. Instances that have just started enter an open one at once.
type counter struct {
	redis *redisServer // nil for a cluster of one
	pool  chan *conn   // connections used before; whoever takes one out owns it until it is back
	spare chan *conn   // connections not needed so far
	ids   []string     // of the entries of all these

	// Only the goroutine that looks uses these.
	lookConn  *conn     // has no entry
	last      ledger    // what the last exchange read, and the entries that it restored
	exchanged time.Time // when that began
	waited    int       // exchanges in the present wait for last's epoch
	failing   bool      // the last exchange failed, and the log says so
	isDown    bool      // the log says that Redis is down
	toldAt    time.Time // when a look last told Redis something new

	mu      sync.Mutex       // guards the rest
	n       int64            // requests counted
	pending *batch           // takes the requests that arrive now
	entries map[string]entry // the copy
	untold  bool             // the next look has something new to tell
	epoch   string           // in which this instance counts; empty before its first; set by look
	total   int64            // of the cluster, the highest seen in that epoch
	down    error            // why Redis is taken to be down; nil if it is up
	downAt  time.Time        // when Redis went down
}

// A batch is the requests that share one command to Redis, which the first of them sends. Requests
// that were answered 503 are counted by a later command, with the numbers before its batch.
type batch struct {
	size int64 // grows, under counter.mu, while the batch is pending; fixed once it is sealed

	done  chan struct{} // closed once the fields below are set
	n     int64         // number of its last request in the instance
	total int64         // number of its last request in the cluster, unless err
	err   error
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

// newCounter returns a counter for the named instance that keeps its ledger at key in Redis, or
// counts alone if redis is nil.
func newCounter(instance, key string, redis *redisServer) *counter {
	c := &counter{
		redis:    redis,
		pool:     make(chan *conn, connections),
		spare:    make(chan *conn, connections),
		lookConn: &conn{server: redis, key: key},
		entries:  map[string]entry{},
		pending:  newBatch(),
	}
	process := instance + "/" + rand.Text() // so a restarted process has entries of its own
	for i := range connections {
		id := process + "/" + strconv.Itoa(i+1)
		c.ids = append(c.ids, id)
		c.spare <- &conn{server: redis, key: key, id: id}
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

// maxWait returns how long after a request has come its last try may begin. Redis may be away for
// the timeout, twice, and lose its data a few times. The last try takes twice the timeout and
// maxPause at the most.
func maxWait(redisTimeout time.Duration) time.Duration {
	return 2*redisTimeout + 4*epochWait - maxPause
}

// send waits for a connection; requests join b meanwhile. Then it seals b by having the next ones
// join another batch, and has it counted.
func (c *counter) send(b *batch) {
	giveUp := time.Now().Add(maxWait(c.redis.timeout))
	cn := c.take()
	defer func() { c.pool <- cn }()
	runtime.Gosched() // lets handlers that are ready to run join this batch
	c.mu.Lock()
	c.pending = newBatch()
	c.n += b.size
	b.n = c.n
	count := c.entries[cn.id].count + b.size
	b.total, b.err = c.raise(cn, count, giveUp) // which unlocks mu meanwhile
	// Not earlier: a look might restore the count before Redis has it, without what it reaches.
	c.entries[cn.id] = entry{count, b.total}
	c.untold = true
	c.mu.Unlock()
	close(b.done)
}

// take waits for a connection. Those used before come first: most are dialed and have an entry in
// the ledger.
func (c *counter) take() *conn {
	select {
	case cn := <-c.pool:
		return cn
	default:
	}
	select {
	case cn := <-c.pool:
		return cn
	case cn := <-c.spare:
		return cn
	}
}

// raise has Redis raise the connection's entry to count, and returns the total that this reached.
// Where the epoch is over it tries again until this instance has entered the next one. While Redis
// is down it fails at once. It is called under mu, and unlocks it while it waits.
func (c *counter) raise(cn *conn, count int64, giveUp time.Time) (int64, error) {
	for c.down == nil {
		if time.Now().After(giveUp) {
			c.fail(errors.New("the data is lost again and again"))
			break
		}
		epoch, known := c.epoch, c.total
		c.mu.Unlock()
		total, err := cn.raise(epoch, known, count)
		lost := errors.Is(err, errLost)
		if lost {
			time.Sleep(retryInterval)
		}
		c.mu.Lock()
		if err == nil {
			c.total = max(c.total, total)
			return total, nil
		}
		if !lost {
			c.fail(err)
		}
	}
	return 0, c.down
}

// fail records, under mu, that Redis is down: requests are answered 503 at once from now on, and
// the next look that succeeds tells Redis what they counted.
func (c *counter) fail(err error) {
	if c.down == nil {
		c.downAt = time.Now()
	}
	c.down = err
}

// log says whether Redis is down, where that has changed. Only look does so: requests do not wait
// for a log that blocks.
func (c *counter) log() {
	c.mu.Lock()
	down, after := c.down, time.Since(c.downAt).Round(time.Millisecond)
	c.mu.Unlock()
	switch {
	case down != nil && !c.isDown:
		slog.Warn("cannot count in Redis", "redis", c.redis, "cause", down)
	case down == nil && c.isDown:
		slog.Info("counting in Redis again", "redis", c.redis, "after", after)
	}
	c.isDown = down != nil
}

// keep looks at Redis at each lookInterval until ctx is done.
func (c *counter) keep(ctx context.Context) {
	if c.redis == nil {
		return
	}
	for ctx.Err() == nil {
		c.look()
		select {
		case <-time.After(lookInterval):
		case <-ctx.Done():
		}
	}
}

// look tells Redis this instance's own entries. Where the total has changed it exchanges the whole
// ledger, less often where that is long. It fails where restoreOwn does.
func (c *counter) look() error {
	c.log() // also of a failure that this look ends
	total, err := c.restoreOwn()
	c.log()
	if err != nil || total == c.last.total || time.Since(c.exchanged) < c.interval() {
		return err
	}
	err = c.exchange()
	if errors.Is(err, errLost) {
		return nil // the next look finds it, too
	}
	if err != nil && !c.failing { // requests are counted even so
		slog.Warn("cannot exchange the ledger with Redis", "redis", c.redis, "cause", err)
	}
	c.failing = err != nil
	return nil
}

// restoreOwn restores this instance's own entries, and returns the total. Where that succeeds Redis
// is up and has its data. Where the epoch is over it follows into the next one, and returns errLost
// until this instance has entered that.
func (c *counter) restoreOwn() (total int64, err error) {
	began := time.Now()
	c.mu.Lock()
	epoch, known, own, untold := c.epoch, c.total, c.own(c.entries), c.untold
	c.untold = false // own has it
	c.mu.Unlock()

	total, err = c.lookConn.restore(epoch, known, own)
	if errors.Is(err, errLost) {
		epoch, total, err = c.follow()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		if !errors.Is(err, errLost) {
			c.fail(err)
		}
		c.untold = true
		return 0, err
	}
	if epoch != c.epoch { // entered
		c.epoch, c.total = epoch, total
	}
	c.total = max(c.total, total)
	if c.downAt.Before(began) { // else Redis went down after this look began
		c.down = nil
	}
	if untold {
		c.toldAt = time.Now()
	}
	return total, nil
}

// own returns those of entries that are this instance's.
func (c *counter) own(entries map[string]entry) map[string]entry {
	own := map[string]entry{}
	for _, id := range c.ids {
		if e, ok := entries[id]; ok {
			own[id] = e
		}
	}
	return own
}

// interval returns the time between two exchanges, longer where the ledger is long: Redis reads out
// all of it.
func (c *counter) interval() time.Duration {
	return min(time.Duration(len(c.last.entries))*entryInterval, maxInterval)
}

// follow exchanges the ledger in an epoch that is new to this instance. It returns errLost until
// this instance has looked often enough, and then the epoch to enter and its total. It counts
// looks, not time: while Redis stands still the others cannot look either.
func (c *counter) follow() (epoch string, total int64, err error) {
	if err := c.exchange(); err != nil {
		return "", 0, err
	}
	// Where this epoch is open all have restored what they knew. So an instance that starts need not
	// wait. One that comes from another epoch does: Redis may have gone back to an earlier one.
	enterAtOnce := c.epoch == "" && c.last.open == c.last.epoch
	if !enterAtOnce && c.waited < minExchanges {
		return "", 0, errLost
	}
	return c.last.epoch, c.last.total, c.lookConn.markOpen(c.last.epoch)
}

// noteWait counts an exchange as a part of the wait for the ledger's epoch, unless it failed. The
// wait begins anew
//   - in another epoch;
//   - where others have added entries before it is open, as they are still restoring.
func (c *counter) noteWait(there ledger, err error) {
	added := len(there.entries) != len(c.last.entries)
	switch {
	case there.epoch != c.last.epoch, added && there.open != there.epoch:
		c.waited = 0
	case err == nil: // Redis has all of the copy here
		c.waited++
	}
	c.last = there
}

// exchange gives each entry the higher of its two counts, in Redis and in the copy here.
func (c *counter) exchange() error {
	c.exchanged = time.Now()
	c.mu.Lock()
	here := maps.Clone(c.entries) // first, so that what is counted meanwhile is not lacking
	c.mu.Unlock()
	there, err := c.lookConn.read()
	if err != nil {
		return err
	}
	lacking, requests := map[string]entry{}, int64(0)
	for id, e := range here {
		if more := e.count - there.entries[id].count; more > 0 {
			lacking[id] = e
			requests += more
		}
	}
	// First the entries that nobody else may know: all those of a long ledger take their time.
	if own := c.own(lacking); len(own) > 0 {
		_, err = c.lookConn.restore(there.epoch, there.total, own)
	}
	if err == nil {
		_, err = c.lookConn.restore(there.epoch, there.total, lacking)
	}

	c.mu.Lock()
	for id, e := range there.entries {
		if e.count > c.entries[id].count {
			c.entries[id] = e
		}
	}
	c.mu.Unlock()

	c.noteWait(there, err)
	if err == nil && len(lacking) > 0 {
		maps.Copy(c.last.entries, lacking) // so that these do not begin the wait anew
		slog.Info("restored what Redis lacked", "redis", c.redis,
			"requests", requests, "entries", len(lacking))
	}
	return err
}

// end tells Redis what was counted here. Then it waits for as long as the other instances may need
// to read that, so that they can restore it. While Redis is away it tries until ctx is done.
func (c *counter) end(ctx context.Context) {
	if c.redis == nil || c.current().n == 0 {
		return
	}
	for waiting := false; ; waiting = true {
		began, wait := time.Now(), lookInterval
		err := c.look() // again and again, as Redis may lose data while it waits
		if err == nil {
			// The others read after their interval, at a look. One look may come late, one may fail.
			left := c.toldAt.Add(c.interval() + 3*lookInterval).Sub(began)
			if left <= 0 {
				return
			}
			wait = min(wait, left)
		}
		if !waiting {
			slog.Info("waiting until Redis and the other instances know what was counted here; "+
				"a second signal ends it", "most", drainTimeout+2*c.redis.timeout)
		}
		select {
		case <-time.After(wait):
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
	n, total int64 // requests handled here, and by all
	down     error // as in counter
	notReady error // nil once an epoch was entered
}

func (c *counter) current() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := status{n: c.n, total: c.total, down: c.down}
	if c.redis != nil && c.epoch == "" {
		s.notReady = cmp.Or(c.down, errors.New("no epoch of the ledger entered yet"))
	}
	return s
}
