// Load sends a steady load of GETs until SIGTERM, or for five minutes at the
// most, and reports "ANSWERS UNAVAILABLE FAILED INSTANCES": how many requests
// were answered with the cluster's number, how many with 503 and without it,
// how many not as promised, and how many instances were seen.
//
//	go run . URL
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

	"load/answer"
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
				a, err := answer.Get(client, os.Args[1])
				mu.Lock()
				switch {
				case err != nil:
					failed++
					fmt.Fprintln(os.Stderr, time.Now().Format("15:04:05.000"), err)
				case a.Status == http.StatusOK:
					answers++
				default:
					unavailable++
				}
				seen[a.Instance] = true
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	delete(seen, "") // of failed requests
	fmt.Println(answers, unavailable, failed, len(seen))
}
