package grpcguard

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	_ "google.golang.org/protobuf/types/known/durationpb"
	_ "google.golang.org/protobuf/types/known/wrapperspb"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/internal/identity"
)

// golden is clients/golden/grpc.json, which every client implements. Its refusals are tested in guard_test.go.
type golden struct {
	Defaults struct {
		KeyMetadata      string `json:"key_metadata"`
		ReplayedMetadata string `json:"replayed_metadata"`
		MaxStoredBytes   int    `json:"max_stored_bytes"`
		ErrorDomain      string `json:"error_domain"`
	}
	Identities []struct {
		Caller, Method string
		KeyMetadata    string `json:"key_metadata"`
		TransactionID  string `json:"transaction_id"`
	}
	Fingerprints []struct {
		Method, Type, Fingerprint string
		Request                   []byte
	}
	Stored []struct {
		Type   string
		Reply  []byte
		Limit  int
		Stored []byte
	}
	Readable []struct {
		Name, Type string
		Stored     []byte
		Reply      *[]byte
	}
	Codes    map[string]string
	Refusals []struct{ Name, Code, Reason string }
}

func readGolden(t *testing.T) golden {
	t.Helper()
	data, err := os.ReadFile("../../golden/grpc.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Identities) == 0 || len(g.Fingerprints) == 0 || len(g.Stored) == 0 || len(g.Readable) == 0 || len(g.Codes) == 0 || len(g.Refusals) == 0 {
		t.Fatalf("vectors are missing: %+v", g)
	}
	return g
}

func typeOf(t *testing.T, name string) protoreflect.MessageType {
	t.Helper()
	found, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func messageOf(t *testing.T, name string, encoded []byte) proto.Message {
	t.Helper()
	message := typeOf(t, name).New().Interface()
	if err := proto.Unmarshal(encoded, message); err != nil {
		t.Fatal(err)
	}
	return message
}

func TestDefaultsMatchTheSharedFile(t *testing.T) {
	want := readGolden(t).Defaults
	if KeyMetadata != want.KeyMetadata || ReplayedMetadata != want.ReplayedMetadata || Domain != want.ErrorDomain || defaultMaxResultBytes != want.MaxStoredBytes {
		t.Errorf("constants differ from %+v", want)
	}
}

func TestIdentitiesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Identities {
		g := &guard{caller: func(context.Context) string { return c.Caller }}
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(KeyMetadata, c.KeyMetadata))
		if id, err := g.keyOfMetadata(ctx, c.Method, nil); err != nil || id != c.TransactionID {
			t.Errorf("%+v: %q, %v", c, id, err)
		}
	}
}

func TestKeysMatchTheSharedFile(t *testing.T) {
	data, err := os.ReadFile("../../golden/http.json")
	if err != nil {
		t.Fatal(err)
	}
	var http struct {
		Keys []struct {
			Headers []string
			Key     string
		}
		InvalidKeys []struct{ Headers []string } `json:"invalid_keys"`
	}
	if err := json.Unmarshal(data, &http); err != nil || len(http.Keys) == 0 || len(http.InvalidKeys) == 0 {
		t.Fatal(http, err)
	}
	g := &guard{caller: func(context.Context) string { return "" }}
	idOf := func(values []string) (string, error) {
		return g.keyOfMetadata(metadata.NewIncomingContext(t.Context(), metadata.MD{KeyMetadata: values}), "/s/M", nil)
	}
	for _, c := range http.Keys {
		want, _ := dedup.TransactionID("grpc", "", "/s/M", c.Key)
		if id, err := idOf(c.Headers); err != nil || id != want {
			t.Errorf("%q: %q, %v", c.Headers, id, err)
		}
	}
	for _, c := range http.InvalidKeys {
		if id, err := idOf(c.Headers); err == nil {
			t.Errorf("%q: %q", c.Headers, id)
		}
	}
}

func TestFingerprintsMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Fingerprints {
		if got := fmt.Sprintf("%x", fingerprintOf(c.Method, messageOf(t, c.Type, c.Request))); got != c.Fingerprint {
			t.Errorf("%+v: %s", c, got)
		}
	}
	if fingerprintOf("/s/M", "not a message") != nil || len(identity.Fingerprint()) == 0 {
		t.Error("a request that is not a message has a fingerprint")
	}
}

func TestStoredRepliesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Stored {
		reply := messageOf(t, c.Type, c.Reply)
		if got := encode(reply, nil, c.Limit); string(got) != string(c.Stored) {
			t.Errorf("%+v: %q", c, got)
		}
		read := decode(c.Stored, typeOf(t, c.Type))
		if kept := strings.HasPrefix(string(c.Stored), string(lineReply)); kept != (read != nil) || kept && !proto.Equal(read, reply) {
			t.Errorf("%+v: read %v", c, read)
		}
	}
}

func TestReadableRepliesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Readable {
		got := decode(c.Stored, typeOf(t, c.Type))
		if (got != nil) != (c.Reply != nil) || got != nil && !proto.Equal(got, messageOf(t, c.Type, *c.Reply)) {
			t.Errorf("%s: %v", c.Name, got)
		}
	}
}

func TestReplyOfAnotherTypeIsNotReplayed(t *testing.T) {
	stored := encode(messageOf(t, "google.protobuf.Duration", nil), nil, 4096)
	if got := decode(stored, typeOf(t, "google.protobuf.StringValue")); got != nil {
		t.Errorf("read %v", got)
	}
}

func TestCodesMatchTheSharedFile(t *testing.T) {
	names := map[string]dedup.Outcome{"complete": dedup.Complete, "release": dedup.Release, "keep": dedup.Keep}
	vectors := readGolden(t).Codes
	if len(vectors) != int(codes.Unauthenticated)+1 {
		t.Errorf("%d codes", len(vectors))
	}
	for name, does := range vectors {
		var code codes.Code
		if err := code.UnmarshalJSON([]byte(`"` + name + `"`)); err != nil {
			t.Fatal(err)
		}
		if want, known := names[does]; !known || OutcomeOf(code) != want {
			t.Errorf("%s: %v, want %s", name, OutcomeOf(code), does)
		}
	}
}
