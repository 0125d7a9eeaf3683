// Package users knows who may say that he is whom: names, and the hashes of
// their passwords.
package users

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Cost is that of new hashes: a guess takes about a twentieth of a second.
const Cost = 10

// The costs of hashes that are taken. A higher one would let a few clients keep
// the processor busy.
const (
	minCost = 8
	maxCost = 14
)

// maxPassword is what bcrypt looks at, in bytes.
const maxPassword = 72

// known is how long a password that was right need not be hashed again: a
// browser opens a dozen connections at a time.
const known = 5 * time.Minute

// maxKnown bounds how many are remembered.
const maxKnown = 1024

// ErrHash: a text is no hash of a password that can be used here.
var ErrHash = errors.New("no bcrypt hash")

// Hash makes the hash of a password, for the configuration.
func Hash(password string) (string, error) {
	if password == "" || len(password) > maxPassword {
		return "", fmt.Errorf("a password has 1 to %d bytes", maxPassword)
	}
	h, err := bcrypt.GenerateFromPassword([]byte(password), Cost)
	if err != nil {
		return "", fmt.Errorf("hash a password: %w", err)
	}
	return string(h), nil
}

// Valid says whether a text of the configuration is a hash, and what is wrong
// with it.
func Valid(hash string) error {
	cost, err := bcrypt.Cost([]byte(hash))
	if err != nil {
		return fmt.Errorf("%w: `gateway passwd` makes one", ErrHash)
	}
	if cost < minCost || cost > maxCost {
		return fmt.Errorf("%w: its cost is %d, want %d to %d", ErrHash, cost, minCost, maxCost)
	}
	return nil
}

// Users checks passwords. What it does takes as long for a name that nobody has
// as for a wrong password. Safe for concurrent use.
type Users struct {
	busy chan struct{} // as many hashes at a time as there are processors
	key  [32]byte      // of what is remembered

	mu     sync.Mutex
	hashes map[string]string
	nobody []byte // a hash of the highest cost in use, for names that nobody has
	right  map[[sha256.Size]byte]time.Time
	now    func() time.Time
}

// New makes one without users. now is the clock.
func New(now func() time.Time) *Users {
	u := &Users{busy: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)), now: now}
	_, _ = rand.Read(u.key[:]) // it never fails (crypto/rand)
	u.Set(nil)
	return u
}

// Set replaces the users: name to hash. What is remembered of passwords is
// forgotten.
func (u *Users) Set(hashes map[string]string) {
	cost := 0
	for _, h := range hashes {
		if c, err := bcrypt.Cost([]byte(h)); err == nil {
			cost = max(cost, c)
		}
	}
	if cost == 0 {
		cost = Cost
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hashes, u.right = maps.Clone(hashes), make(map[[sha256.Size]byte]time.Time)
	if c, err := bcrypt.Cost(u.nobody); err != nil || c != cost {
		var secret [16]byte
		_, _ = rand.Read(secret[:])
		u.nobody, _ = bcrypt.GenerateFromPassword(secret[:], cost) // a cost that was checked
	}
}

// Has says whether there is a user of a name.
func (u *Users) Has(name string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, ok := u.hashes[name]
	return ok
}

// Check says whether a password is the user's. It takes a while, and no more
// calls than half of the processors can carry work at a time.
func (u *Users) Check(name, password string) bool {
	u.mu.Lock()
	hash, ok := u.hashes[name]
	against := []byte(hash)
	if !ok {
		against = u.nobody
	}
	id := u.id(name, password, against)
	until, recent := u.right[id]
	now := u.now()
	u.mu.Unlock()
	if recent && now.Before(until) {
		return true
	}
	// Longer ones cannot be hashed, and no user has one.
	try := password[:min(len(password), maxPassword)]
	u.busy <- struct{}{}
	err := bcrypt.CompareHashAndPassword(against, []byte(try))
	<-u.busy
	if err != nil || !ok || len(password) > maxPassword {
		return false
	}
	u.remember(id, name, hash)
	return true
}

// id stands for what was checked; it tells nobody the password.
func (u *Users) id(name, password string, hash []byte) (out [sha256.Size]byte) {
	m := hmac.New(sha256.New, u.key[:])
	fmt.Fprintf(m, "%d:%s%d:%s%s", len(name), name, len(password), password, hash)
	copy(out[:], m.Sum(nil))
	return out
}

func (u *Users) remember(id [sha256.Size]byte, name, hash string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.hashes[name] != hash {
		return // changed meanwhile
	}
	if len(u.right) >= maxKnown {
		clear(u.right)
	}
	u.right[id] = u.now().Add(known)
}
