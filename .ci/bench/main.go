// Bench measures the service beside its peers, with Redis on loopback and a
// network away, and several instances of it before one Redis. It prints tables
// in Markdown, and on stderr what it is doing. It needs Linux, wrk and
// redis-server; all traffic stays on loopback.
//
//	go run . [-rounds 3] [-seconds 3] [-connections 4,64,256] [-peers go-redis,bare]
//	go run . -scale
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const networkDelay = 250 * time.Microsecond // each way

func main() {
	log.SetFlags(0)
	rounds := flag.Int("rounds", 3, "measurements of each contestant, in turn")
	seconds := flag.Int("seconds", 3, "length of a measurement")
	levels := flag.String("connections", "4,64,256", "numbers of connections")
	names := flag.String("peers", "go-redis,bare", "whom to compare with; rueidis is another")
	scale := flag.Bool("scale", false, "measure how many instances one Redis bears, busy and idle")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch args := flag.Args(); {
	case len(args) == 4 && args[0] == "peer":
		err = servePeer(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "delay":
		err = serveDelay(args[1], args[2], networkDelay)
	case len(args) > 0:
		err = fmt.Errorf("unknown arguments %q", args)
	default:
		levels, peers := strings.Split(*levels, ","), strings.Split(*names, ",")
		err = measure(ctx, *rounds, *seconds, levels, peers, *scale)
	}
	if err != nil {
		log.Fatal("bench: ", err)
	}
}

func measure(ctx context.Context, rounds, seconds int, levels, peers []string, scale bool) error {
	if rounds < 1 || seconds < 1 {
		return fmt.Errorf("-rounds %d -seconds %d: want 1 or more", rounds, seconds)
	}
	runtime.LockOSThread() // a child ends with the thread that started it
	for _, need := range []string{"wrk", "redis-server"} {
		if _, err := exec.LookPath(need); err != nil {
			return fmt.Errorf("%w: apt-get install wrk redis-server", err)
		}
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{ctx: ctx, seconds: seconds, program: filepath.Join(dir, "requestcount")}
	build := exec.Command("go", "build", "-trimpath", "-o", b.program, ".")
	build.Dir, build.Stderr = "../..", os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("building the service: %w", err)
	}
	redis := freeAddr()
	_, port, _ := net.SplitHostPort(redis)
	b.redis, err = b.start(redis, nil, "redis-server", "--port", port, "--bind", "127.0.0.1",
		"--save", "", "--dir", dir)
	if err != nil {
		return err
	}
	defer b.redis.end()
	if scale {
		if err = b.busy(redis); err == nil {
			err = b.idle(redis)
		}
	} else {
		err = b.compare(redis, rounds, levels, peers)
	}
	if err == nil {
		fmt.Printf("\nMeasured on %d cores of %s, %s/%s, %s, %s.\n", runtime.NumCPU(), cpuModel(),
			runtime.GOOS, runtime.GOARCH, runtime.Version(), redisVersion())
	}
	return err
}

// A bench starts programs and loads them.
type bench struct {
	ctx     context.Context
	seconds int
	program string
	redis   *process
}

// A process is a running program.
type process struct {
	*exec.Cmd
	exited chan struct{} // closed once it has ended
}

func (p *process) end() {
	p.Process.Kill()
	<-p.exited
}

// start starts a program, with the settings in env only, and waits until it
// listens at addr.
func (b *bench) start(addr string, env []string, name string, args ...string) (*process, error) {
	p := &process{exec.CommandContext(b.ctx, name, args...), make(chan struct{})}
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.Env = append([]string{"ADDR=" + addr}, env...)
	var said strings.Builder
	p.Stdout, p.Stderr = &said, &said
	if err := p.Start(); err != nil {
		return nil, err
	}
	go func() { p.Wait(); close(p.exited) }()
	for range 200 {
		if nc, err := net.Dial("tcp", addr); err == nil {
			nc.Close()
			return p, nil
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("%s has ended: %s", name, &said)
		case <-time.After(25 * time.Millisecond):
		}
	}
	p.end()
	return nil, fmt.Errorf("%s does not listen at %s: %s", name, addr, &said)
}

// contestant starts the service or a peer.
func (b *bench) contestant(name, addr, redis string) (*process, error) {
	if name == "requestcount" {
		return b.start(addr, []string{"REDIS_URL=redis://" + redis}, b.program)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return b.start(addr, nil, self, "peer", name, addr, redis)
}

// A result is what a load of one contestant gave.
type result struct {
	rate  float64 // answers a second
	redis float64 // Redis' CPU for an answer, in µs
}

var (
	wrkRate = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkSum  = regexp.MustCompile(`(\d+) requests in`)
	wrkBad  = regexp.MustCompile(`Non-2xx or 3xx responses: \d+|Socket errors: .*`)
)

// load has wrk send requests to addr over so many connections.
func (b *bench) load(addr, connections string) (r result, err error) {
	wrk := func(seconds int) ([]byte, error) {
		return exec.CommandContext(b.ctx, "wrk", "-t1", "-c"+connections,
			fmt.Sprintf("-d%ds", seconds), "http://"+addr+"/").CombinedOutput()
	}
	if out, err := wrk(1); err != nil {
		return r, fmt.Errorf("wrk: %w: %s", err, out)
	}
	before := cpu(b.redis)
	out, err := wrk(b.seconds)
	used := cpu(b.redis) - before
	if bad := wrkBad.Find(out); err != nil || bad != nil {
		return r, fmt.Errorf("wrk at %s with %s connections: %v %s", addr, connections, err, bad)
	}
	rate, sum := wrkRate.FindSubmatch(out), wrkSum.FindSubmatch(out)
	if rate == nil || sum == nil {
		return r, fmt.Errorf("wrk says %s", out)
	}
	return result{number(rate[1]), float64(used.Microseconds()) / number(sum[1])}, nil
}

func number(b []byte) float64 {
	f, _ := strconv.ParseFloat(string(b), 64) // what the pattern has let through
	return f
}

// cpu returns what a process has used, from /proc/PID/stat, in ticks of 10 ms.
func cpu(p *process) time.Duration {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// compare measures all contestants in turn, so that a drift of the machine hits
// all alike, and prints what the service reaches of each peer.
func (b *bench) compare(redis string, rounds int, levels, peers []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	away := freeAddr()
	delay, err := b.start(away, nil, self, "delay", away, redis)
	if err != nil {
		return err
	}
	defer delay.end()
	head := "| where Redis is | connections |"
	for _, peer := range peers {
		peer = strings.Replace(peer, "bare", "bare net/http", 1)
		head += " compared with " + peer + " (1.0 = equal) |"
	}
	fmt.Println(head)
	fmt.Println("|---|---|" + strings.Repeat("---|", len(peers)))
	for _, place := range []struct{ name, addr string }{
		{"the same machine", redis},
		{fmt.Sprint("a network of ", networkDelay, " each way away"), away},
	} {
		for _, connections := range levels {
			rates := map[string][]float64{}
			for round := range rounds {
				for _, name := range append([]string{"requestcount"}, peers...) {
					log.Printf("Redis: %s; %s connections, round %d of %d: %s",
						place.name, connections, round+1, rounds, name)
					r, err := b.once(name, place.addr, connections)
					if err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
					rates[name] = append(rates[name], r.rate)
				}
			}
			row := fmt.Sprintf("| %s | %s |", place.name, connections)
			for _, peer := range peers {
				row += " " + ratios(rates["requestcount"], rates[peer]) + " |"
			}
			fmt.Println(row)
		}
	}
	return nil
}

// once measures one contestant.
func (b *bench) once(name, redis, connections string) (result, error) {
	addr := freeAddr()
	p, err := b.contestant(name, addr, redis)
	if err != nil {
		return result{}, err
	}
	defer p.end()
	return b.load(addr, connections)
}

// ratios returns the ratio of the medians and, of the rounds, the lowest and the highest.
func ratios(ours, theirs []float64) string {
	var each []float64
	for i := range ours {
		each = append(each, ours[i]/theirs[i])
	}
	ratio := median(ours) / median(theirs)
	return fmt.Sprintf("%.2f (%.2f to %.2f)", ratio, slices.Min(each), slices.Max(each))
}

func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}

// freeAddr returns an address on loopback that is free, below the ports that
// the kernel gives to clients.
func freeAddr() string {
	for port := 17000 + os.Getpid()%1000; ; port++ {
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
}

func cpuModel() string {
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(info), "model name")
	model, _, _ = strings.Cut(model, "\n")
	return cmp.Or(strings.Trim(model, " \t:"), "an unknown processor")
}

func redisVersion() string {
	out, _ := exec.Command("redis-server", "--version").Output()
	return "Redis " + strings.TrimPrefix(strings.Fields(string(out) + " v=unknown")[2], "v=")
}
