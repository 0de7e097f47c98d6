package faults

import (
	"cmp"
	"math"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// fetchAndIncrement is a counter whose answers are told by their rank: 0 for
// the lowest number that any client was told, and so on. So a number that
// nobody was told, as those of 503s and of batches whose answer was given up,
// is no gap, and each step has one answer only, which keeps the search short.
var fetchAndIncrement = porcupine.Model{
	Init: func() any { return 0 },
	Step: func(state, _, output any) (bool, any) { return output == state, state.(int) + 1 },
}

// linearizable fails the test unless the numbers are such as a single counter
// gives, each once, and a higher one to a request that started after another was answered.
func linearizable(t testing.TB, whose string, answers []answer, number func(a answer) int64) {
	t.Helper()
	var numbers []int64
	for _, a := range answers {
		numbers = append(numbers, number(a))
	}
	slices.Sort(numbers)
	if n := len(slices.Compact(slices.Clone(numbers))); n != len(numbers) {
		t.Errorf("%s's numbers: got %d different ones, want %d", whose, n, len(numbers))
		return
	}
	var history []porcupine.Operation
	for i, a := range answers {
		rank, _ := slices.BinarySearch(numbers, number(a))
		history = append(history, porcupine.Operation{
			ClientId: i, Call: int64(a.start), Return: int64(a.end), Output: rank,
		})
	}
	result, info := porcupine.CheckOperationsVerbose(fetchAndIncrement, history, 20*time.Second)
	if result != porcupine.Ok {
		longest := 0
		for _, part := range info.PartialLinearizations()[0] {
			longest = max(longest, len(part))
		}
		t.Errorf("%s's numbers are not linearizable (%s): %d was told after a higher one",
			whose, result, numbers[min(longest, len(numbers)-1)])
	}
}

// A lowAnswer has a number that is not above one told before it was asked for.
type lowAnswer struct {
	answer
	before int64
}

// tooLow returns the answers that a counter which loses nothing would not
// give, in order of their end.
func tooLow(answers []answer) (low []lowAnswer) {
	byStart := func(a, b answer) int { return cmp.Compare(a.start, b.start) }
	byEnd := func(a, b answer) int { return cmp.Compare(a.end, b.end) }
	starts := slices.SortedFunc(slices.Values(answers), byStart)
	ends := slices.SortedFunc(slices.Values(answers), byEnd)
	highest := int64(math.MinInt64)
	for _, a := range starts {
		for ends[0].end < a.start { // a itself ends later, so it never runs out
			highest, ends = max(highest, ends[0].Total), ends[1:]
		}
		if a.Total <= highest {
			low = append(low, lowAnswer{a, highest})
		}
	}
	slices.SortFunc(low, func(a, b lowAnswer) int { return byEnd(a.answer, b.answer) })
	return low
}

// oneTo fails the test unless the instance's numbers are 1 … k, each once.
func oneTo(t testing.TB, instance string, answers []answer) {
	t.Helper()
	byNumber := func(a, b answer) int { return cmp.Compare(a.N, b.N) }
	answers = slices.SortedFunc(slices.Values(answers), byNumber)
	for i, a := range answers {
		if a.N != int64(i+1) {
			t.Errorf("instance %s, answer %d of %d: got %d", instance, i+1, len(answers), a.N)
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
