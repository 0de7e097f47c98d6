package faults

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A fleet is some instances that share a Redis, and the clients that load them.
type fleet struct {
	t         testing.TB
	redis     *server // has the total
	base      int     // the total before the first request
	url       string  // where the instances find Redis
	env       []string
	proxy     *proxy // where url is one's
	processes []*process
	clients   int
	older     time.Duration // when Redis went back to an older copy, since epoch; 0 if never

	mu        sync.Mutex
	instances []*process // those under load
	killed    int
	answers   []answer
	failed    int // requests without an answer
}

const clientsEach = 4 // of each instance

// learned is how long it takes until each instance knows what the others have counted: it looks
// every quarter of a second.
const learned = 600 * time.Millisecond

// useRedis has the instances use s.
func (f *fleet) useRedis(s *server) {
	f.redis, f.url = s, "redis://:"+password+"@"+s.addr()
}

// useProxy puts a proxy between the instances and Redis.
func (f *fleet) useProxy() {
	f.proxy = newProxy(f.t, f.redis.addr())
	f.url = strings.Replace(f.url, f.redis.addr(), f.proxy.Addr().String(), 1)
}

// fill puts n entries of other instances into the ledger, each of one request.
func (f *fleet) fill(n int) {
	f.t.Helper()
	fields := []any{"total", n}
	for i := range n {
		fields = append(fields, fmt.Sprintf("host:1/X%d/1", i+1), fmt.Sprint("1 ", i+1))
	}
	if err := f.redis.client.HSet(context.Background(), "requestcount", fields...).Err(); err != nil {
		f.t.Fatal(err)
	}
	f.base = n
}

// start starts an instance at addr, in place of instance i.
func (f *fleet) start(i int, addr string) {
	p := startProcessAt(f.t, addr, nil, append(f.env, "REDIS_URL="+f.url)...)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.instances[i] = p
	f.processes = append(f.processes, p)
}

// replace starts an instance with a name of its own in place of instance i.
func (f *fleet) replace(i int) { f.start(i, "127.0.0.1:"+freePort()) }

// kill ends an instance as a crash would.
func (f *fleet) kill(p *process) {
	p.kill()
	f.killed++
	f.processes = slices.DeleteFunc(f.processes, func(other *process) bool { return other == p })
}

// terminate asks all instances to stop.
func (f *fleet) terminate() {
	for _, p := range f.instances {
		p.terminate()
	}
}

// stop ends some of the instances at the same time.
func (f *fleet) stop(ps ...*process) {
	f.t.Helper()
	for _, p := range ps {
		p.terminate()
	}
	for _, p := range ps {
		if status, log := p.stop(); status != 0 {
			f.t.Errorf("instance %s stopped: got status %d, want 0\n%s", p.addr, status, log)
		}
	}
}

// load has the clients send requests, each with a pause in between, until ctx is done. People go
// round the instances, as a load balancer has them do; a machine stays with one.
func (f *fleet) load(ctx context.Context, pause time.Duration, people bool) {
	var wg sync.WaitGroup
	for n := range f.clients {
		wg.Go(func() {
			c := &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}
			defer c.CloseIdleConnections()
			for sleep(ctx, pause) {
				f.ask(c, n%len(f.instances))
				if people {
					n++
				}
			}
		})
	}
	wg.Wait()
}

// ask sends a request to instance i, records the answer, and says whether it was a 200.
func (f *fleet) ask(c *http.Client, i int) bool {
	f.mu.Lock()
	url := f.instances[i].url
	f.mu.Unlock()
	a, err := ask(c, url)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.failed++
	} else {
		f.answers = append(f.answers, a)
	}
	return a.Status == http.StatusOK
}

// recover fails the test unless each instance that runs answers with 200 within d.
func (f *fleet) recover(d time.Duration) {
	f.t.Helper()
	began := time.Now()
	for i, p := range f.instances {
		for answered := false; p.runs() && !answered; time.Sleep(10 * time.Millisecond) {
			answered = f.ask(client, i)
			if took := time.Since(began); took > d {
				f.t.Errorf("instance %s: got no 200 within %v, want one within %v", p.addr, took, d)
				break
			}
		}
	}
	f.t.Logf("all instances answer with 200 after %v", time.Since(began))
}

// total fails the test unless the total grows, within the time for a few looks at a long ledger,
// by the number of requests answered, or up to more of those that were given up beside them. It
// returns by how much it has grown.
func (f *fleet) total(when string, answered, more int) (grown int) {
	f.t.Helper()
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		reply := f.redis.do("HGET requestcount total")
		n, err := strconv.Atoi(reply)
		if grown = n - f.base; err == nil && grown >= answered && grown <= answered+more {
			return grown
		}
		if time.Since(began) > 15*time.Second {
			f.t.Errorf("the total %s: got %s, want %d, or up to %d more that were given up",
				when, reply, f.base+answered, more)
			return grown
		}
	}
}

// A scenario is something that happens to a fleet under load.
type scenario struct {
	name      string
	timeout   string         // REDIS_TIMEOUT
	instances int            // 3 unless set
	people    bool           // two clients, at the speed of people, in place of four each
	entries   int            // in the ledger before the instances start
	proxied   bool           // a proxy is between
	prepare   func(f *fleet) // before the instances start; nil for one plain Redis
	fault     func(f *fleet) // while they are under load
	fails     bool           // some requests must be answered with 503; else none may be
	stops     bool           // instances are away for a while: some requests get no answer
}

var scenarios = []scenario{
	{name: "FLUSHALL at random, two people", timeout: "5s", people: true,
		fault: times(6, func(f *fleet) {
			upTo(4 * time.Second)
			f.redis.do("FLUSHALL")
		})},
	{name: "Redis killed and restarted empty at random, two people", timeout: "5s", people: true,
		fault: times(5, func(f *fleet) {
			upTo(4 * time.Second)
			f.redis.restart(rand.N(time.Second))
		})},
	{name: "instances start and end as Redis loses its data, two people",
		timeout: "5s", people: true, stops: true,
		fault: times(4, func(f *fleet) {
			i := rand.IntN(len(f.instances))
			ends := f.instances[i]
			f.replace(i)
			ends.terminate()
			upTo(600 * time.Millisecond) // in which it has ended, or not
			f.lose()
			upTo(600 * time.Millisecond)
			f.replace((i + 1) % len(f.instances)) // the one before runs on
			upTo(2 * time.Second)
		})},
	{name: "instances killed as Redis loses its data, two people",
		timeout: "5s", people: true, stops: true,
		fault: times(4, func(f *fleet) {
			f.recover(10 * time.Second)
			i := rand.IntN(len(f.instances))
			dies := f.instances[i]
			f.replace(i)
			time.Sleep(learned)
			f.kill(dies)
			f.lose()
			upTo(2 * time.Second)
		})},
	{name: "Redis losing its data each 0.3 s for ten seconds", timeout: "1s", fails: true,
		fault: func(f *fleet) {
			for began := time.Now(); time.Since(began) < 10*time.Second; f.redis.do("FLUSHALL") {
				time.Sleep(300 * time.Millisecond)
			}
			f.recover(3 * time.Second)
		}},
	{name: "Redis killed and restarted empty, ten times", timeout: "5s",
		fault: times(10, func(f *fleet) {
			f.redis.restart(100 * time.Millisecond)
			time.Sleep(100 * time.Millisecond)
		})},
	{name: "Redis refusing connections for 0.9 of the timeout", timeout: "5s",
		fault: func(f *fleet) {
			f.redis.restart(4 * time.Second) // and up to half a second to start
		}},
	{name: "Redis refusing connections for 0.9 of the timeout as SIGTERM comes",
		timeout: "5s", stops: true,
		fault: func(f *fleet) {
			f.redis.kill()
			f.terminate()
			time.Sleep(4 * time.Second)
			f.redis.start()
			f.stop(f.instances...)
		}},
	{name: "Redis stopped for more than the timeout", timeout: "300ms", fails: true,
		fault: func(f *fleet) {
			f.redis.suspend(time.Second)
		}},
	{name: "FLUSHALL with 50,000 entries and five instances",
		timeout: "5s", instances: 5, entries: 50_000,
		fault: func(f *fleet) {
			time.Sleep(4 * time.Second) // the ledger is read each 3 s
			f.redis.do("FLUSHALL")
		}},
	{name: "Redis stopped for two seconds with 20,000 entries",
		timeout: "1s", entries: 20_000, fails: true,
		fault: func(f *fleet) {
			f.redis.suspend(2 * time.Second)
			f.recover(3 * time.Second) // one on a machine that has time
		}},
	failover("failover that waits for the replica", func(f *fleet, to *server) {
		from := f.redis
		if !strings.Contains(from.do("COMMAND INFO FAILOVER"), "failover") {
			from.t.Skip("skipped: FAILOVER needs Redis 6.2")
		}
		from.do("FAILOVER TO 127.0.0.1 " + to.port)
		from.until("INFO replication", "role:slave")
	}),
	failover("failover that loses the last second", func(f *fleet, to *server) {
		to.do("REPLICAOF NO ONE")
		time.Sleep(time.Second)
		f.older = time.Since(epoch)
		f.redis.do("REPLICAOF 127.0.0.1 " + to.port)
	}),
	redisCluster("", ""),
	// They have no hostname, so MOVED points to "?".
	redisCluster(" whose nodes do not know their own names", "hostname"),
	{name: "TLS, all connections cut ten times", timeout: "5s", prepare: func(f *fleet) {
		port, files := freePort(), certificate(f.t)
		f.redis = startTLS(f.t, port, files)
		f.url = "rediss://:" + password + "@127.0.0.1:" + port + "\n"
		f.env = []string{"SSL_CERT_FILE=" + files}
	}, fault: times(10, func(f *fleet) {
		f.redis.do("CLIENT KILL USER default")
		time.Sleep(20 * time.Millisecond)
	})},
	{name: "everything dead in silence for 0.9 of the timeout", timeout: "4s", proxied: true,
		fault: func(f *fleet) {
			f.proxy.set(vanish)
			time.Sleep(3600 * time.Millisecond)
			f.proxy.setComing(none)
			time.Sleep(2500 * time.Millisecond)
		}},
	{name: "commands delivered after they were given up and their instances have ended",
		timeout: "1s", proxied: true, stops: true,
		fault: func(f *fleet) {
			f.proxy.setOpen(hold)
			time.Sleep(1200 * time.Millisecond) // in which they are sent again, on new connections
			f.stop(f.instances[0], f.instances[1])
			f.proxy.setOpen(none)
		}},
	{name: "Redis full of clients for less than the timeout", timeout: "2s", fault: func(f *fleet) {
		f.redis.do("CONFIG SET maxclients 1")
		f.redis.do("CLIENT KILL USER default")
		time.Sleep(500 * time.Millisecond)
		f.redis.do("CONFIG SET maxclients 1000")
	}},
	{name: "Redis without enough replicas for less than the timeout", timeout: "2s",
		fault: func(f *fleet) {
			f.redis.do("CONFIG SET min-replicas-to-write 1")
			time.Sleep(500 * time.Millisecond)
			f.redis.do("CONFIG SET min-replicas-to-write 0")
		}},
	{name: "instance suspended for longer than the timeout", timeout: "1s", proxied: true,
		fault: func(f *fleet) {
			f.proxy.set(hold)
			time.Sleep(100 * time.Millisecond) // after which it waits for replies
			f.instances[0].Process.Signal(syscall.SIGSTOP)
			f.proxy.set(none)
			time.Sleep(2 * time.Second)
			f.instances[0].Process.Signal(syscall.SIGCONT)
		}},
	{name: "rollout, then Redis restarted empty", timeout: "5s", stops: true,
		fault: func(f *fleet) {
			for i := range f.instances {
				f.stop(f.instances[i])
				f.replace(i)
			}
			f.redis.restart(100 * time.Millisecond)
		}},
	{name: "SIGTERM while Redis is away for longer than the timeout",
		timeout: "300ms", fails: true, stops: true,
		fault: func(f *fleet) {
			f.redis.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(500 * time.Millisecond)
			f.terminate()
			time.Sleep(2 * time.Second)
			f.redis.cmd.Process.Signal(syscall.SIGCONT)
			f.stop(f.instances...)
		}},
}

// lose has Redis lose its data, in one of two ways.
func (f *fleet) lose() {
	if rand.IntN(2) == 0 {
		f.redis.do("FLUSHALL")
	} else {
		f.redis.restart(0)
	}
}

// upTo sleeps for a time at random.
func upTo(d time.Duration) { time.Sleep(rand.N(d)) }

// times returns a fault that happens n times.
func times(n int, once func(f *fleet)) func(f *fleet) {
	return func(f *fleet) {
		for range n {
			once(f)
		}
	}
}

// Whatever is done to real servers and instances under load, the total ends up as the number of
// requests answered, no number is told twice, and none is lower than one told before.
func TestRealServers(t *testing.T) {
	for _, tt := range scenarios {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := &fleet{t: t, instances: make([]*process, cmp.Or(tt.instances, 3))}
			if tt.prepare != nil {
				tt.prepare(f)
			} else {
				f.useRedis(startServer(t))
			}
			if tt.entries > 0 {
				f.fill(tt.entries)
			}
			if tt.proxied {
				f.useProxy()
			}
			f.env = append(f.env, "REDIS_TIMEOUT="+tt.timeout)
			for i := range f.instances {
				f.replace(i)
			}
			f.suffer(tt)
			f.check(tt)
		})
	}
}

// suffer loads the instances while the fault happens, and a little before and after.
func (f *fleet) suffer(tt scenario) {
	pause := 4 * time.Millisecond
	f.clients = clientsEach * len(f.instances)
	if tt.people {
		f.clients, pause = 2, 200*time.Millisecond
	}
	for _, p := range f.instances { // they wait for their first epoch
		eventually(f.t, func() error { return p.says("/readyz", "ready") })
	}
	ctx, cancel := context.WithCancel(context.Background())
	var loading sync.WaitGroup
	defer loading.Wait()
	defer cancel()
	loading.Go(func() { f.load(ctx, pause, tt.people) })
	time.Sleep(300 * time.Millisecond)
	tt.fault(f)
	time.Sleep(500 * time.Millisecond)
}

// check fails the test unless all answers and the total are right, at once and
// after all instances have ended.
func (f *fleet) check(tt scenario) {
	f.recover(10 * time.Second)
	total := told(f.answers)
	unavailable := len(f.answers) - len(total)
	var slowest time.Duration
	for _, a := range f.answers {
		slowest = max(slowest, a.end-a.start)
	}
	f.t.Logf("slowest answer: %v; %d requests without an answer", slowest, f.failed)
	if (unavailable > 0) != tt.fails {
		f.t.Errorf("503s: got %d, want some: %t", unavailable, tt.fails)
	}
	if f.failed > 0 && !tt.stops {
		f.t.Errorf("requests without an answer: got %d, want 0", f.failed)
	}
	given := f.killed * f.clients
	grown := f.total("at the end", len(f.answers), given)
	bad := wrong(total, func(a answer) int64 { return a.Total })
	report(tt.name, len(f.answers), unavailable, grown, len(bad))
	f.checkWrong(bad)
	f.checkInstances()
	f.total("after all instances have ended", len(f.answers), given)
	if f.t.Failed() {
		for _, p := range f.processes {
			f.t.Logf("instance %s:\n%s", p.addr, tail(p.stderr.String()))
		}
	}
}

// checkWrong fails the test if more numbers were told twice or lower than may be: one for each
// request whose reply a kill of Redis may have lost, and those told until an instance has looked
// at an older copy of the ledger.
func (f *fleet) checkWrong(bad []answer) {
	most := 0
	for _, killed := range f.redis.kills {
		for _, a := range f.answers {
			if a.start < killed.end && a.end > killed.start {
				most++
			}
		}
	}
	if f.older > 0 {
		bad = slices.DeleteFunc(bad, func(a answer) bool {
			return a.end > f.older && a.start < f.older+time.Second
		})
	}
	if len(bad) > most {
		f.t.Errorf("numbers told twice or lower: got %d, want %d at the most; the first: %+v",
			len(bad), most, bad[0])
	}
}

var (
	results   []string
	resultsMu sync.Mutex
)

// report notes a row for printResults.
func report(name string, answered, unavailable, counted, wrong int) {
	resultsMu.Lock()
	defer resultsMu.Unlock()
	results = append(results,
		fmt.Sprintf("| %s | %d | %d | %d | %d |\n", name, answered, unavailable, counted, wrong))
}

// printResults prints what came of the scenarios, as .ci/README.md shows it.
func printResults() {
	if len(results) > 0 {
		fmt.Print("\n| fault | requests answered | of them 503 | counted | " +
			"numbers told twice or lower |\n|---|---|---|---|---|\n" + strings.Join(results, ""))
	}
}

// checkInstances ends all instances, and fails the test unless each gave its
// numbers as a counter does, and says how many.
func (f *fleet) checkInstances() {
	f.stop(f.processes...)
	for _, p := range f.processes {
		_, port, _ := strings.Cut(p.addr, ":")
		own := slices.DeleteFunc(slices.Clone(f.answers), func(a answer) bool {
			return !strings.HasSuffix(a.Instance, ":"+port)
		})
		oneTo(f.t, p.addr, own)
		want := fmt.Sprintf("msg=stop handled=%d\n", len(own))
		if !strings.HasSuffix(p.stderr.String(), want) {
			f.t.Errorf("instance %s's log: got no %q at its end", p.addr, want)
		}
	}
}

// failover returns a scenario in which the role of the primary, and its
// address, go from one server to another.
func failover(name string, promote func(f *fleet, to *server)) scenario {
	var heir *server
	s := scenario{name: name, timeout: "5s", proxied: true}
	s.prepare = func(f *fleet) {
		f.useRedis(startServer(f.t))
		heir = startServer(f.t, "replicaof 127.0.0.1 "+f.redis.port)
		heir.until("INFO replication", "master_link_status:up")
	}
	s.fault = func(f *fleet) {
		promote(f, heir)
		time.Sleep(100 * time.Millisecond) // in which the instances are told READONLY
		f.redis = heir
		f.proxy.redirect(heir.addr())
	}
	return s
}

// redisCluster returns a scenario in which the instances are pointed at a node
// that does not own the key, and it moves to another node under load. MOVED points to the
// owner's IP address, unless endpoints says otherwise.
func redisCluster(whose, endpoints string) scenario {
	var servers [3]*server // the owner, the next owner, and the one pointed at
	var ids [3]string
	s := scenario{name: "Redis Cluster" + whose + ", the slot moved", timeout: "5s"}
	s.prepare = func(f *fleet) {
		for i := range servers {
			servers[i] = startServer(f.t, "cluster-enabled yes", "cluster-node-timeout 5000")
			ids[i] = servers[i].do("CLUSTER MYID")
			servers[i].do(fmt.Sprint("CLUSTER SET-CONFIG-EPOCH ", i+1))
			if i > 0 {
				servers[0].do("CLUSTER MEET 127.0.0.1 " + servers[i].port)
			}
		}
		const slots = 16384 // the key's is 866; the first third of them belongs to the owner
		var owned [3]strings.Builder
		for slot := range slots {
			fmt.Fprintf(&owned[slot*3/slots], " %d", slot)
		}
		for i, s := range servers {
			s.do("CLUSTER ADDSLOTS" + owned[i].String())
			if endpoints != "" {
				s.configure("cluster-preferred-endpoint-type", endpoints)
			}
		}
		for _, s := range servers {
			s.until("CLUSTER INFO", "cluster_state:ok")
			s.until("CLUSTER INFO", "cluster_known_nodes:3")
		}
		f.useRedis(servers[2])
		f.redis = servers[0]
	}
	s.fault = func(f *fleet) {
		slot := f.redis.do("CLUSTER KEYSLOT requestcount")
		servers[1].do("CLUSTER SETSLOT " + slot + " IMPORTING " + ids[0])
		servers[0].do("CLUSTER SETSLOT " + slot + " MIGRATING " + ids[1])
		servers[0].do("MIGRATE 127.0.0.1 " + servers[1].port +
			" requestcount 0 5000 AUTH2 admin admin")
		time.Sleep(100 * time.Millisecond) // in which the instances are told ASK
		for _, s := range servers {
			s.do("CLUSTER SETSLOT " + slot + " NODE " + ids[1])
		}
		f.redis = servers[1]
	}
	return s
}
