package users

import (
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

func hash(t *testing.T, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), minCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

func TestWhoKnowsThePasswordIsTheUser(t *testing.T) {
	clock := time.Unix(1, 0)
	u := New(func() time.Time { return clock })
	long := strings.Repeat("x", 72)
	u.Set(map[string]string{"alice": hash(t, "secret"), "bob": hash(t, long)})
	for _, c := range []struct {
		name, password string
		right          bool
	}{
		{"alice", "secret", true},
		{"alice", "secret", true}, // remembered
		{"alice", "Secret", false},
		{"alice", "", false},
		{"alice", "secret\x00", false},
		{"Alice", "secret", false},
		{"carol", "secret", false},
		{"", "", false},
		{"bob", long, true},
		{"bob", long + "y", false}, // bcrypt looks at 72 bytes only
	} {
		if got := u.Check(c.name, c.password); got != c.right {
			t.Errorf("%q with %q: %v", c.name, c.password, got)
		}
	}
	clock = clock.Add(time.Hour)
	if !u.Check("alice", "secret") {
		t.Error("an hour later the password is wrong")
	}
	u.Set(map[string]string{"alice": hash(t, "other")})
	if u.Check("alice", "secret") || !u.Check("alice", "other") || u.Has("bob") || !u.Has("alice") {
		t.Error("the former users are there still")
	}
}

func TestHashes(t *testing.T) {
	good, err := Hash("x")
	if err != nil {
		t.Fatal(err)
	}
	for text, ok := range map[string]bool{
		good: true, "": false, "secret": false, good[:20]: false,
		strings.Replace(good, "$10$", "$04$", 1): false, strings.Replace(good, "$10$", "$20$", 1): false,
	} {
		if err := Valid(text); (err == nil) != ok || err != nil && !errors.Is(err, ErrHash) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, password := range []string{"", strings.Repeat("x", 73)} {
		if _, err := Hash(password); err == nil {
			t.Errorf("a password of %d bytes", len(password))
		}
	}
}

// A name that nobody has takes as long as a wrong password: a hash of the same
// cost is computed.
func TestNobodyTakesAsLong(t *testing.T) {
	u := New(time.Now)
	for _, cost := range []int{8, 11} {
		h, err := bcrypt.GenerateFromPassword([]byte("secret"), cost)
		if err != nil {
			t.Fatal(err)
		}
		u.Set(map[string]string{"alice": string(h)})
		if got, err := bcrypt.Cost(u.nobody); err != nil || got != cost {
			t.Errorf("nobody's hash costs %d, %v, want %d", got, err, cost)
		}
	}
	const least = 5 * time.Millisecond // of such a hash, on any machine
	for range 3 {
		if begin := time.Now(); u.Check("nobody", "wrong") || time.Since(begin) < least {
			t.Errorf("nobody is looked at for %v only", time.Since(begin))
		}
	}
}
