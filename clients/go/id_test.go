package dedup_test

import (
	"encoding/json"
	"os"
	"testing"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

func TestTransactionIDMatchesTheGoldenVectors(t *testing.T) {
	data, err := os.ReadFile("../golden_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		TransactionIDs struct {
			Valid []struct {
				Parts []string
				ID    string
			}
			Invalid []struct {
				Parts []string
				Why   string
			}
		} `json:"transaction_ids"`
	}
	if err := json.Unmarshal(data, &golden); err != nil {
		t.Fatal(err)
	}
	if len(golden.TransactionIDs.Valid) == 0 || len(golden.TransactionIDs.Invalid) == 0 {
		t.Fatal("no vectors")
	}
	for _, vector := range golden.TransactionIDs.Valid {
		if id, err := dedup.TransactionID(vector.Parts...); err != nil || id != vector.ID {
			t.Errorf("TransactionID(%q) = %q, %v, want %q", vector.Parts, id, err, vector.ID)
		}
	}
	for _, vector := range golden.TransactionIDs.Invalid {
		if id, err := dedup.TransactionID(vector.Parts...); err == nil {
			t.Errorf("TransactionID of %s = %q, want an error", vector.Why, id)
		}
	}
}

func TestTransactionIDRejectsInvalidUTF8(t *testing.T) {
	if id, err := dedup.TransactionID("a", "\xff"); err == nil {
		t.Errorf("got %q, want an error", id)
	}
}
