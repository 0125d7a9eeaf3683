package ftp

// class says what the gateway does with a command.
type class uint8

const (
	unknown   class = iota
	reads           // passes
	writes          // passes unless the rule is read-only
	active          // PORT, EPRT: the server will connect to the client
	passive         // PASV, EPSV: the client will connect to the server
	unhandled       // negotiates a data connection in a way that is not followed: 502
	secures         // AUTH, ADAT: what follows may be hidden
	secured         // carries a hidden command
)

// verbs are the commands of FTP and what became of it. A verb that begins with
// X and is not here is an experiment (RFC 959, 5.4) and counts as writing.
var verbs = map[string]class{
	// RFC 959
	"USER": reads, "PASS": reads, "ACCT": reads, "CWD": reads, "CDUP": reads,
	"SMNT": reads, "REIN": reads, "QUIT": reads, "TYPE": reads, "STRU": reads,
	"MODE": reads, "RETR": reads, "REST": reads, "ABOR": reads, "PWD": reads,
	"LIST": reads, "NLST": reads, "SYST": reads, "STAT": reads, "HELP": reads,
	"NOOP": reads, "PORT": active, "PASV": passive,
	"STOR": writes, "STOU": writes, "APPE": writes, "ALLO": writes, "RNFR": writes,
	"RNTO": writes, "DELE": writes, "RMD": writes, "MKD": writes, "SITE": writes,
	// RFC 775, 1123
	"XCUP": reads, "XCWD": reads, "XPWD": reads, "XMKD": writes, "XRMD": writes,
	// RFC 1639
	"LPRT": unhandled, "LPSV": unhandled,
	// RFC 2228, 4217
	"AUTH": secures, "ADAT": secures, "PROT": reads, "PBSZ": reads, "CCC": reads,
	"MIC": secured, "CONF": secured, "ENC": secured,
	// RFC 2389, 2428, 2640, 3659, 7151
	"FEAT": reads, "OPTS": reads, "EPRT": active, "EPSV": passive, "LANG": reads,
	"MDTM": reads, "SIZE": reads, "MLST": reads, "MLSD": reads, "HOST": reads,
	// drafts and products
	"MFMT": writes, "MFCT": writes, "MFF": writes, "COMB": writes,
	"HASH": reads, "RANG": reads, "CLNT": reads, "CSID": reads, "AVBL": reads,
	"DSIZ": reads, "THMB": reads, "PRET": reads, "MD5": reads, "MMD5": reads,
	"XCRC": reads, "XMD5": reads, "XSHA": reads, "XSHA1": reads, "XSHA224": reads,
	"XSHA256": reads, "XSHA384": reads, "XSHA512": reads,
	"SPSV": unhandled, "SPRT": unhandled, "CPSV": unhandled, "SSCN": unhandled,
}

// classOf knows the verbs of the rule as well. The verb is in upper case.
func (o *options) classOf(verb string) class {
	if c := verbs[verb]; c != unknown {
		return c
	}
	switch {
	case o.extra[verb]:
		return reads
	case len(verb) > 1 && verb[0] == 'X' && isVerb(verb):
		return writes
	}
	return unknown
}

// maxVerb bounds a verb, in bytes.
const maxVerb = 10

func isVerb(s string) bool {
	if len(s) == 0 || len(s) > maxVerb || !isLetter(s[0]) {
		return false
	}
	for i := range len(s) {
		if !isLetter(s[i]) && !isDigit(s[i]) {
			return false
		}
	}
	return true
}

func isLetter(b byte) bool { return 'A' <= b&^0x20 && b&^0x20 <= 'Z' }
func isDigit(b byte) bool  { return '0' <= b && b <= '9' }
