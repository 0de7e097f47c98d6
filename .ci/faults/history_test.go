package faults

import (
	"cmp"
	"math"
	"net/http"
	"slices"
	"testing"
)

// wrong returns the answers that a single counter would not give: those that were told a number
// twice, and those that were told one not higher than a request that was answered before they
// began. A history without any is linearizable: sorted by their numbers the requests are in order.
func wrong(answers []answer, number func(a answer) int64) (wrong []answer) {
	byStart := func(a, b answer) int { return cmp.Compare(a.start, b.start) }
	byEnd := func(a, b answer) int { return cmp.Compare(a.end, b.end) }
	ends := slices.SortedFunc(slices.Values(answers), byEnd)
	highest, seen := int64(math.MinInt64), map[int64]bool{}
	for _, a := range slices.SortedFunc(slices.Values(answers), byStart) {
		for ends[0].end < a.start { // a itself ends later, so it never runs out
			highest, ends = max(highest, number(ends[0])), ends[1:]
		}
		if number(a) <= highest || seen[number(a)] {
			wrong = append(wrong, a)
		}
		seen[number(a)] = true
	}
	return wrong
}

// oneTo fails the test unless the instance's numbers are 1 … k, each once and in order.
func oneTo(t testing.TB, instance string, answers []answer) {
	t.Helper()
	n := func(a answer) int64 { return a.N }
	if bad := wrong(answers, n); len(bad) > 0 {
		t.Errorf("instance %s: %d numbers told twice or lower, such as %+v", instance, len(bad), bad[0])
	}
	for _, a := range answers {
		if a.N < 1 || a.N > int64(len(answers)) {
			t.Errorf("instance %s: got %d, want 1 to %d", instance, a.N, len(answers))
			return
		}
	}
}

// told returns the answers that have the cluster's number.
func told(answers []answer) []answer {
	return slices.DeleteFunc(slices.Clone(answers), func(a answer) bool {
		return a.Status != http.StatusOK
	})
}
