// Package faults breaks real redis-servers, the network and instances of the
// built program under load, and checks every answer: `make faults`. It knows
// the program by its HTTP interface, its settings and its log only.
package faults

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	load "load/answer"
)

// program is the built program: $PROGRAM, or what TestMain builds.
var program = os.Getenv("PROGRAM")

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if _, err := exec.LookPath(redisServer); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go startCommands()
	if program == "" {
		dir, err := os.MkdirTemp("", "faults")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "requestcount")
		build := exec.Command("go", "build", "-o", program, ".")
		build.Dir = "../.."
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
			return 1
		}
	}
	defer printResults()
	return m.Run()
}

var commands = make(chan func())

// startCommands starts all processes on one thread that lives as long as the
// tests: Linux ends a process with endWithTests when the thread that started it ends.
func startCommands() {
	runtime.LockOSThread()
	for start := range commands {
		start()
	}
}

// startCommand starts cmd so that it does not outlive the tests, however they end.
func startCommand(cmd *exec.Cmd) error {
	cmd.SysProcAttr = endWithTests
	started := make(chan error)
	commands <- func() { started <- cmd.Start() }
	return <-started
}

var lastPort atomic.Int64

func init() { lastPort.Store(int64(12_000 + rand.IntN(9_000))) }

// freePort returns a port that is free and that it has not returned before. It
// and the port of Redis Cluster's bus, 10,000 above it, are below those that
// the kernel gives to clients.
func freePort() string {
	for {
		if port := int(lastPort.Add(1)); isFree(port) && isFree(port+10_000) {
			return strconv.Itoa(port)
		}
	}
}

func isFree(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
	if err == nil {
		l.Close()
	}
	return err == nil
}

// eventually waits up to 10 s until try gives no error.
func eventually(t testing.TB, try func() error) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Since(began) > 10*time.Second {
			t.Fatalf("after 10 s: %v", err)
		}
	}
}

// listens gives an error unless something listens at addr.
func listens(addr string) error {
	nc, err := net.Dial("tcp", addr)
	if err == nil {
		nc.Close()
	}
	return err
}

// A process is a running instance of the program.
type process struct {
	*exec.Cmd
	addr, url  string
	terminated sync.Once
	stderr     bytes.Buffer  // complete once it has exited
	exited     chan struct{} // closed then
}

// startProcess starts an instance at a free port of loopback, with the
// settings in env only, and waits until it listens.
func startProcess(t testing.TB, env ...string) *process {
	return startProcessAt(t, "127.0.0.1:"+freePort(), nil, env...)
}

// startProcessAt starts an instance at addr that logs to a file, or to p.stderr where that is nil.
func startProcessAt(t testing.TB, addr string, log *os.File, env ...string) *process {
	t.Helper()
	p := &process{
		Cmd:  exec.Command(program),
		addr: addr, url: "http://" + addr,
		exited: make(chan struct{}),
	}
	p.Env = append([]string{"ADDR=" + addr}, env...)
	p.Stderr = &p.stderr
	if log != nil {
		p.Stderr = log
	}
	if err := startCommand(p.Cmd); err != nil {
		t.Fatal(err)
	}
	go func() { p.Wait(); close(p.exited) }()
	t.Cleanup(func() { p.kill() })
	eventually(t, func() error {
		if !p.runs() {
			t.Fatalf("the server did not start:\n%s", &p.stderr)
		}
		return listens(addr)
	})
	return p
}

// kill ends the instance as a crash would.
func (p *process) kill() {
	p.Process.Kill()
	<-p.exited
}

// runs says whether the instance has not ended.
func (p *process) runs() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// terminate asks the instance to stop, once: a signal a second later would end it at once.
func (p *process) terminate() {
	p.terminated.Do(func() { p.Process.Signal(syscall.SIGTERM) })
}

// stop ends the instance as a scale-down does, and returns its exit status and what it logged.
func (p *process) stop() (int, string) {
	p.terminate()
	<-p.exited
	return p.ProcessState.ExitCode(), p.stderr.String()
}

// lines returns how often the instance, which has ended, logged the message.
func (p *process) lines(message string) int {
	return strings.Count(p.stderr.String(), fmt.Sprintf(" msg=%q ", message))
}

// client gives up a request that nobody answers.
var client = &http.Client{Timeout: 30 * time.Second}

// get returns the status and the body of the page at url.
func get(t testing.TB, url string) (int, string) {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// says gives an error unless the page at path begins with that text.
func (p *process) says(path, text string) error {
	resp, err := client.Get(p.url + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && !strings.HasPrefix(string(body), text) {
		err = fmt.Errorf("%s: got %q, want %q", path, body, text)
	}
	return err
}

// An answer is what a request to / was told, and when.
type answer struct {
	start, end time.Duration // since epoch
	load.Answer
}

var epoch = time.Now()

// ask sends a request and reads its answer, which must have the promised form.
func ask(c *http.Client, url string) (a answer, err error) {
	a.start = time.Since(epoch)
	a.Answer, err = load.Get(c, url)
	a.end = time.Since(epoch)
	return a, err
}

// next fails the test unless the next request to p is told that number of the cluster.
func next(t testing.TB, p *process, want int64) {
	t.Helper()
	a, err := ask(client, p.url)
	if err != nil || a.Status != http.StatusOK || a.Total != want {
		t.Errorf("instance %s: got %+v, %v, want a 200 and %d", p.addr, a, err, want)
	}
}

// sleep waits for d, or until ctx is done, and says whether it still goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
