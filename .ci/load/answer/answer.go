// Package answer asks the service and reads what it was told.
package answer

import (
	"fmt"
	"io"
	"net/http"
	"strings"
)

// An Answer is what a request to / was told.
type Answer struct {
	Status   int    // 200 or, while Redis is down, 503
	Instance string // host:port
	N        int64  // the instance's number
	Total    int64  // the cluster's; 0 with a 503
}

const (
	counted   = "This is request %d to this instance and request %d to the cluster.\n"
	uncounted = "This is request %d to this instance; the cluster count is unavailable.\n"
)

// Get sends a request to url. What does not have the promised form is an error.
func Get(c *http.Client, url string) (a Answer, err error) {
	resp, err := c.Get(url)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil { // not wrapped: it is not to be taken for a connection that was refused
		return a, fmt.Errorf("%s: answer cut off: %v", resp.Status, err)
	}
	a.Status = resp.StatusCode
	form, numbers := counted, []any{&a.N, &a.Total}
	if a.Status == http.StatusServiceUnavailable {
		form, numbers = uncounted, numbers[:1]
	}
	first, second, _ := strings.Cut(string(body), "\n")
	name, begins := strings.CutPrefix(first, "You are talking to instance ")
	name, ends := strings.CutSuffix(name, ".")
	a.Instance = name
	if _, err := fmt.Sscanf(second, form, numbers...); err != nil || !begins || !ends {
		return a, fmt.Errorf("%s: not the promised answer: %q", resp.Status, body)
	}
	return a, nil
}
