// Load sends a steady load of GETs until SIGTERM, or for five minutes at the
// most, and reports "ANSWERS FAILED INSTANCES": what was answered with a
// number, what was not, and how many instances were seen.
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
	answers, failed, seen := 0, 0, map[string]bool{}
	var wg sync.WaitGroup
	for i := range 8 {
		// Half of the clients keep their connections, half come anew each time.
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: i%2 == 0}}
		wg.Go(func() {
			for ctx.Err() == nil {
				instance, err := get(client, os.Args[1])
				mu.Lock()
				if err != nil {
					failed++
					fmt.Fprintln(os.Stderr, time.Now().Format("15:04:05.000"), err)
				} else {
					answers++
					seen[instance] = true
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	fmt.Println(answers, failed, len(seen))
}

func get(client *http.Client, url string) (instance string, err error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var n, total int
	_, err = fmt.Fscanf(resp.Body, "You are talking to instance %s\nThis is request %d to this instance and request %d to the cluster.\n", &instance, &n, &total)
	if err != nil {
		return "", fmt.Errorf("%s: %w", resp.Status, err)
	}
	return instance, nil
}
