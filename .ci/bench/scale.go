package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"strings"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// startInstances starts n instances, and returns where they listen and what ends them.
func (b *bench) startInstances(redis string, n int) (addrs []string, end func(), err error) {
	var all []*process
	end = func() {
		for _, p := range all {
			p.end()
		}
	}
	for range n {
		addr := freeAddr()
		p, err := b.contestant("requestcount", addr, redis)
		if err != nil {
			end()
			return nil, nil, err
		}
		addrs, all = append(addrs, addr), append(all, p)
	}
	return addrs, end, nil
}

// busy measures several instances before one Redis, each asked over 8 connections.
func (b *bench) busy(redis string) error {
	fmt.Println("| busy instances | answers a second | Redis' CPU for an answer | of one core |")
	fmt.Println("|---|---|---|---|")
	for _, n := range []int{1, 3, 10, 30} {
		log.Printf("%d busy instances", n)
		if err := b.busyRow(redis, n); err != nil {
			return err
		}
	}
	fmt.Println()
	return nil
}

func (b *bench) busyRow(redis string, n int) error {
	addrs, end, err := b.startInstances(redis, n)
	if err != nil {
		return err
	}
	defer end()
	var rate, used float64 // of all
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failed error
	for _, addr := range addrs {
		wg.Go(func() {
			r, err := b.load(addr, "8")
			mu.Lock()
			defer mu.Unlock()
			rate += r.rate
			used += r.redis * r.rate / float64(n) // each load sees what Redis does for all
			failed = cmp.Or(failed, err)
		})
	}
	wg.Wait()
	if failed != nil {
		return failed
	}
	fmt.Printf("| %d | %.0f | %.1f µs | %.0f %% |\n", n, rate, used/rate, used/1e4)
	return nil
}

// idle measures what instances cost Redis that nobody asks, and what they
// answer when Redis has lost its data.
func (b *bench) idle(redis string) error {
	fmt.Println("| idle instances | connections to Redis | commands a second " +
		"| Redis' CPU, of one core | first number after FLUSHALL | all is back after |")
	fmt.Println("|---|---|---|---|---|---|")
	for _, n := range []int{10, 30, 100} {
		log.Printf("%d idle instances", n)
		if err := b.idleRow(redis, n); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) idleRow(redis string, n int) error {
	client := goredis.NewClient(&goredis.Options{Addr: redis, PoolSize: 1})
	defer client.Close()
	if err := client.FlushAll(b.ctx).Err(); err != nil {
		return err
	}
	addrs, end, err := b.startInstances(redis, n)
	if err != nil {
		return err
	}
	defer end()
	const each = 9 // requests
	for range each {
		for _, addr := range addrs {
			if _, err := ask(b.ctx, addr); err != nil {
				return err
			}
		}
	}
	time.Sleep(2 * time.Second) // each knows what the others have counted
	began, used := time.Now(), cpu(b.redis)
	commands := stat(b.ctx, client, "total_commands_processed")
	time.Sleep(time.Duration(b.seconds) * time.Second)
	took := time.Since(began).Seconds()
	used = cpu(b.redis) - used
	commands = stat(b.ctx, client, "total_commands_processed") - commands
	connections := stat(b.ctx, client, "connected_clients") - 1 // without this one

	began = time.Now()
	if err := client.FlushAll(b.ctx).Err(); err != nil {
		return err
	}
	first, err := ask(b.ctx, addrs[0])
	if err != nil {
		return err
	}
	for want := int64(n*each + 1); ; time.Sleep(time.Millisecond) {
		total, err := client.Get(b.ctx, "requestcount").Int64()
		back := time.Since(began)
		if total == want {
			fmt.Printf("| %d | %d | %.0f | %.1f %% | %d of %d | %d ms |\n", n, connections,
				float64(commands)/took, 100*used.Seconds()/took, first, want, back.Milliseconds())
			return nil
		}
		if back > 10*time.Second {
			return fmt.Errorf("10 s after FLUSHALL: total %d, %v, want %d", total, err, want)
		}
	}
}

// ask returns the cluster's number of a request.
func ask(ctx context.Context, addr string) (total int64, err error) {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	_, number, _ := strings.Cut(string(body), "instance and request ")
	if _, err := fmt.Sscan(number, &total); err != nil {
		return 0, fmt.Errorf("no number of the cluster in %q", body)
	}
	return total, nil
}

// stat returns a number of Redis' INFO, or 0.
func stat(ctx context.Context, client *goredis.Client, name string) (n int) {
	_, value, _ := strings.Cut(client.Info(ctx).Val(), name+":")
	fmt.Sscan(value, &n)
	return n
}
