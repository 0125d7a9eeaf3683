package engine

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
)

// Conntrack tells of every flow of a mapping that ends, but not of every one that
// begins: the kernel carries those of a known endpoint without a word, which
// would cost it as much as the flow itself. So what is counted is too low, and
// never too high; a mapping that seems to have no flow may have some, and before
// it leaves the kernel, and again before its external endpoint is returned, its
// flows are looked for in conntrack's table. One look is for all mappings that
// wait for it.

// surveyShare bounds the time that is spent looking: a tenth. While the table is
// large, mappings stay for longer.
const surveyShare = 10

// survey is one look at conntrack's table.
type survey struct {
	found   map[*mapping][]LivingFlow // of those that are looked for
	journal map[flow.Tuple]journalled // what was told since it began
}

// unused says which of these mappings have no flow, and has the flows of the
// others counted. false: that cannot be said now.
func (e *Engine) unused(list []*mapping) (none []*mapping, ok bool) {
	x := &e.mappings
	if len(list) == 0 {
		return nil, true
	}
	s := &survey{found: make(map[*mapping][]LivingFlow, len(list)), journal: make(map[flow.Tuple]journalled)}
	for _, m := range list {
		s.found[m] = nil
	}
	begun := e.now()
	x.mu.Lock()
	if x.survey != nil || begun.Before(x.rested) {
		x.mu.Unlock()
		return nil, false
	}
	x.survey = s
	x.mu.Unlock()
	err := e.kernel.Living(context.Background(), func(f LivingFlow) {
		x.mu.Lock()
		defer x.mu.Unlock()
		sender, target := x.of(f.Tuple, f.Translation)
		for _, m := range [...]*mapping{sender, target} {
			if so, looked := s.found[m]; looked {
				s.found[m] = append(so, f)
			}
		}
	})
	x.mu.Lock()
	defer x.mu.Unlock()
	now := e.now()
	x.rested = now.Add(surveyShare * now.Sub(begun))
	if err != nil {
		x.survey = nil
		e.log.Error("looking for the flows of mappings failed; it is tried again", zap.Error(err))
		return nil, false
	}
	for m, flows := range s.found {
		if len(flows) > 0 {
			x.rest(m, now.Add(lateReports)) // until they are counted
			continue
		}
		none = append(none, m)
		delete(s.found, m)
	}
	if len(s.found) == 0 {
		x.survey = nil
		return none, true
	}
	e.later(lateReports, func() { e.surveyed(s) }) // what is on its way comes until then
	return none, true
}

// surveyed sets the numbers of flows of the mappings that had some.
func (e *Engine) surveyed(s *survey) {
	x := &e.mappings
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.survey != s {
		return // all flows were counted anew
	}
	x.survey = nil
	count := make(map[*mapping]int32, len(s.found))
	for m, flows := range s.found {
		for _, f := range flows {
			if _, told := s.journal[f.Tuple]; !told {
				count[m]++
			}
		}
	}
	for t, j := range s.journal {
		if !j.alive() {
			continue
		}
		sender, target := x.of(t, j.translation)
		for _, m := range [...]*mapping{sender, target} {
			if _, counted := s.found[m]; counted {
				count[m]++
			}
		}
	}
	for m := range s.found {
		if x.byExternal[m.externalKey()] != m {
			continue
		}
		n := count[m]
		if m.extra != nil {
			n += m.extra.inUser
		}
		e.count(m, n-m.flows)
	}
}

// note keeps what is told while flows are counted.
func note(journal map[flow.Tuple]journalled, t flow.Tuple, tr flow.Translation, by int32) {
	if journal == nil {
		return
	}
	j, told := journal[t]
	journal[t] = journalled{tr, j.begun + by, j.endedFirst || !told && by < 0}
}

// counted are the flows of mappings as conntrack lists them; nil: it does not.
type counted map[*mapping]int

// living counts the flows of all mappings, for people.
func (e *Engine) living() counted {
	x := &e.mappings
	flows := make(counted)
	if !e.HoldsMappings() {
		return flows
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := e.kernel.Living(ctx, func(f LivingFlow) {
		x.mu.Lock()
		defer x.mu.Unlock()
		sender, target := x.of(f.Tuple, f.Translation)
		for _, m := range [...]*mapping{sender, target} {
			if m != nil {
				flows[m]++
			}
		}
	})
	if err != nil {
		e.log.Warn("the flows of mappings are not all counted", zap.Error(err))
		return nil
	}
	return flows
}

// of gives the number of a mapping's flows, or how many are known. mappings.mu is
// held.
func (c counted) of(m *mapping) int {
	if c == nil {
		return max(int(m.flows), 0)
	}
	n := c[m]
	if m.extra != nil {
		n += int(m.extra.inUser)
	}
	return n
}
