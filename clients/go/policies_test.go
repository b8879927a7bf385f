package dedup_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// rules are those of a namespace in clients/golden/policies.json. Durations are milliseconds, 0 if left out.
type rules struct {
	DefaultTTL int64 `json:"default_ttl_ms"`
	MaxTTL     int64 `json:"max_ttl_ms"`
	Retention  int64 `json:"retention_ms"`
	Shadow     bool
}

type policyStep struct {
	Do, Namespace, ID, As, Claim, Fingerprint, Expect, Field string
	TTL                                                      int64 `json:"ttl_ms"`
	Lease                                                    int64 `json:"lease_ms"`
	Retained                                                 int64 `json:"retained_ms"`
	ResultBytes                                              int   `json:"result_bytes"`
}

type policyScenario struct {
	Name           string
	AllowUnknown   *bool `json:"allow_unknown_namespaces"`
	MaxResultBytes int   `json:"max_result_bytes"`
	Namespaces     map[string]rules
	Steps          []policyStep
}

type policyVectors struct {
	Scenarios       []policyScenario
	InvalidPolicies []struct {
		Why    string
		Policy rules
	} `json:"invalid_policies"`
}

func readPolicies(t *testing.T) (vectors policyVectors) {
	t.Helper()
	data, err := os.ReadFile("../golden/policies.json")
	if err == nil {
		err = json.Unmarshal(data, &vectors)
	}
	if err != nil || len(vectors.Scenarios) == 0 || len(vectors.InvalidPolicies) == 0 {
		t.Fatalf("%v, %+v", err, vectors)
	}
	return vectors
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

func (r rules) policy() deduptest.Policy {
	return deduptest.Policy{DefaultTTL: ms(r.DefaultTTL), MaxTTL: ms(r.MaxTTL), Retention: ms(r.Retention), Shadow: r.Shadow}
}

// fake returns a guard with the rules of the scenario.
func (s policyScenario) fake() dedup.Guard {
	guard := deduptest.NewGuard()
	for name, r := range s.Namespaces {
		guard.Service.SetPolicy(name, r.policy())
	}
	if s.AllowUnknown != nil {
		guard.Service.SetAllowUnknownNamespaces(*s.AllowUnknown)
	}
	if s.MaxResultBytes > 0 {
		guard.Service.SetMaxResultBytes(s.MaxResultBytes)
	}
	return guard
}

// live returns a client of a service with the rules of the scenario.
func (s policyScenario) live(t *testing.T) dedup.Guard {
	var file strings.Builder
	fmt.Fprintf(&file, "allow_unknown_namespaces = %t\n", s.AllowUnknown == nil || *s.AllowUnknown)
	for name, r := range s.Namespaces {
		fmt.Fprintf(&file, "[namespaces.%s]\n", name)
		for field, value := range map[string]int64{"default_ttl": r.DefaultTTL, "max_ttl": r.MaxTTL, "retention": r.Retention} {
			if value > 0 {
				fmt.Fprintf(&file, "%s = \"%dms\"\n", field, value)
			}
		}
		if r.Shadow {
			file.WriteString("mode = \"shadow\"\n")
		}
	}
	folder := t.TempDir()
	path := filepath.Join(folder, "policy.toml")
	writeFile(t, path, file.String())
	options := []string{"--policy-file", path}
	if s.MaxResultBytes > 0 {
		options = append(options, "--max-result-bytes", strconv.Itoa(s.MaxResultBytes))
	}
	return newClient(t, servertest.Start(t, "sqlite:///"+filepath.Join(folder, "claims.db"), options...).Target)
}

func TestFakeHasTheRulesOfTheService(t *testing.T) {
	for _, scenario := range readPolicies(t).Scenarios {
		t.Run(scenario.Name+"/fake", func(t *testing.T) { playPolicies(t, scenario.fake(), scenario.Steps) })
		t.Run(scenario.Name+"/live", func(t *testing.T) { playPolicies(t, scenario.live(t), scenario.Steps) })
	}
}

func playPolicies(t *testing.T, guard dedup.Guard, steps []policyStep) {
	claims := map[string]*dedup.Claim{}
	for i, step := range steps {
		happened, err := step.play(guard, claims)
		var invalid *dedup.Error
		switch {
		case errors.Is(err, dedup.ErrPayloadMismatch):
			happened = "mismatch"
		case errors.Is(err, dedup.ErrDuplicate):
			happened = "duplicate"
		case errors.As(err, &invalid) && len(invalid.Violations) == 1 && invalid.Violations[0].Field == step.Field:
			happened = "invalid"
		case err != nil:
			happened = err.Error()
		}
		if happened != step.Expect {
			t.Fatalf("step %d, %+v: %s", i, step, happened)
		}
	}
}

// play plays one step and checks its times.
func (step policyStep) play(guard dedup.Guard, claims map[string]*dedup.Claim) (string, error) {
	ctx := context.Background()
	if step.Do == "claim" {
		opts := []dedup.CallOption{dedup.Namespace(step.Namespace), dedup.Fingerprint([]byte(step.Fingerprint))}
		if step.TTL > 0 {
			opts = append(opts, dedup.TTL(ms(step.TTL)))
		}
		claim, err := guard.Claim(ctx, step.ID, opts...)
		if err != nil {
			return "", err
		}
		claims[step.As] = claim
		if claim.ShadowDuplicate {
			return "shadow_duplicate", nil
		}
		return lasts("claimed", claim.Transaction.ClaimTime, claim.Transaction.ExpireTime, step.Lease), nil
	}
	claim := claims[step.Claim]
	switch step.Do {
	case "complete":
		var opts []dedup.CompleteOption
		if step.TTL > 0 {
			opts = append(opts, dedup.RetainFor(ms(step.TTL)))
		}
		if err := claim.Complete(ctx, make([]byte, step.ResultBytes), opts...); err != nil {
			return "", err
		}
		held, err := guard.Get(ctx, claim.Transaction.ID, dedup.Namespace(claim.Transaction.Namespace))
		if err != nil {
			return "", err
		}
		return lasts("completed", held.CompletionTime, held.ExpireTime, step.Retained), nil
	case "extend":
		// Extend takes a ttl here, also where other clients have the default of the namespace.
		end, err := claim.Extend(ctx, ms(cmp.Or(step.TTL, step.Lease)))
		if err != nil {
			return "", err
		}
		return lasts("extended", claim.Transaction.ClaimTime, end, step.Lease), nil
	default:
		return "released", claim.Release(ctx)
	}
}

// lasts returns what happened, or the wrong lifetime. The service reads its clock once for the reply and once for the
// store.
func lasts(happened string, begin, end time.Time, want int64) string {
	if d := end.Sub(begin); (d - ms(want)).Abs() > time.Minute {
		return fmt.Sprintf("%s for %v", happened, d)
	}
	return happened
}

func TestPolicyThatTheServiceRejectsPanics(t *testing.T) {
	for _, c := range readPolicies(t).InvalidPolicies {
		var text string
		func() {
			defer func() { text = fmt.Sprint(recover()) }()
			deduptest.NewService().SetPolicy("pay", c.Policy.policy())
		}()
		if !slices.ContainsFunc([]string{"DefaultTTL", "Retention"}, func(field string) bool { return strings.Contains(text, field+" is") }) {
			t.Errorf("%s: %s", c.Why, text)
		}
	}
}
