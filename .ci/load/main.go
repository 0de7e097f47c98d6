// Load sends a steady load of GETs until SIGTERM, or for five minutes at the
// most, and reports "ANSWERS UNAVAILABLE FAILED INSTANCES": how many requests
// were answered with the cluster's number, how many with 503 and without it,
// how many not as promised, and how many instances were seen.
//
//	go run .ci/load/main.go URL
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var mu sync.Mutex
	answers, unavailable, failed, seen := 0, 0, 0, map[string]bool{}
	var wg sync.WaitGroup
	for i := range 8 {
		// Half of the clients keep their connections, half come anew each time.
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: i%2 == 0}}
		wg.Go(func() {
			for ctx.Err() == nil {
				instance, status, err := get(client, os.Args[1])
				mu.Lock()
				switch {
				case err != nil:
					failed++
					fmt.Fprintln(os.Stderr, time.Now().Format("15:04:05.000"), err)
				case status == http.StatusOK:
					answers++
				default:
					unavailable++
				}
				seen[instance] = true
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	delete(seen, "") // of failed requests
	fmt.Println(answers, unavailable, failed, len(seen))
}

// get returns the instance that answered with 200 or, as promised while Redis
// is down, with 503; anything else is an error.
func get(client *http.Client, url string) (instance string, status int, err error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	want := "You are talking to instance %s\nThis is request %d to this instance and request %d to the cluster.\n"
	var n, total int
	numbers := []any{&instance, &n, &total}
	if resp.StatusCode == http.StatusServiceUnavailable {
		want = "You are talking to instance %s\nThis is request %d to this instance; the cluster count is unavailable.\n"
		numbers = numbers[:2]
	}
	if _, err := fmt.Fscanf(resp.Body, want, numbers...); err != nil {
		return "", resp.StatusCode, fmt.Errorf("%s: %w", resp.Status, err)
	}
	return instance, resp.StatusCode, nil
}
