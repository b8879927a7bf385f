{{/*
The container. `dedup.sidecar` and `dedup.shared-container` include it with .root, .listen, and their .settings.
*/}}
{{- define "dedup.container" -}}
{{- $values := .root.Values -}}
name: dedup
image: {{ $values.image.repository }}{{ if $values.image.digest }}@{{ $values.image.digest }}{{ else }}:{{ $values.image.tag }}{{ end }}
env:
  - name: DEDUP_LISTEN
    value: {{ .listen }}
  # The kubelet connects to the pod's address, so probes reach neither the socket nor the loopback.
  - name: DEDUP_HEALTH_LISTEN
    value: 0.0.0.0:50052
  - name: DEDUP_METRICS_LISTEN
    value: 0.0.0.0:50053
  - name: DEDUP_READINESS
    value: {{ $values.readiness }}
  - name: DEDUP_SHUTDOWN_GRACE
    value: {{ $values.shutdownGrace }}
  - name: DEDUP_STORE_URL
    valueFrom:
      secretKeyRef:
        name: {{ $values.store.secretName }}
        key: {{ $values.store.secretKey }}
  {{- range $name, $value := merge (dict) .settings $values.settings }}
  - name: {{ $name }}
    value: {{ $value | toString | quote }}
  {{- end }}
# Start-up and liveness do not depend on Redis: a restart would not repair it.
startupProbe:
  grpc:
    port: 50052
    service: liveness
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 60
livenessProbe:
  grpc:
    port: 50052
    service: liveness
  periodSeconds: 10
  timeoutSeconds: 2
  failureThreshold: 3
readinessProbe:
  grpc:
    port: 50052
    service: readiness
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
resources:
  {{- toYaml $values.resources | nindent 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/*
A native sidecar, as an item of `initContainers`, for an app's chart that depends on this one:
    initContainers:
      - {{- include "dedup.sidecar" .Subcharts.dedup | nindent 10 }}
*/}}
{{- define "dedup.sidecar" -}}
restartPolicy: Always
{{ include "dedup.container" (dict "root" . "listen" "unix:///run/dedup/dedup.sock" "settings" dict) }}
ports:
  - name: dedup-health
    containerPort: 50052
  - name: dedup-metrics
    containerPort: 50053
volumeMounts:
  - name: dedup
    mountPath: /run/dedup
{{- end }}

{{/*
Its item of `volumes`. The app mounts it too, at /run/dedup, and the pod needs securityContext.fsGroup: 65532.
*/}}
{{- define "dedup.sidecar-volume" -}}
name: dedup
emptyDir:
  medium: Memory
  sizeLimit: 1Mi
{{- end }}

{{- define "dedup.shared-container" -}}
{{- $tls := dict "DEDUP_TLS_CERT" "/etc/dedup/tls/tls.crt" "DEDUP_TLS_KEY" "/etc/dedup/tls/tls.key" "DEDUP_TLS_CLIENT_CA" "/etc/dedup/tls/ca.crt" -}}
{{- $settings := ternary $tls (dict "DEDUP_ALLOW_UNAUTHENTICATED" "true") (ne .Values.shared.tlsSecretName "") -}}
{{ include "dedup.container" (dict "root" . "listen" "0.0.0.0:50051" "settings" $settings) }}
ports:
  - name: grpc
    containerPort: 50051
  - name: dedup-health
    containerPort: 50052
  - name: dedup-metrics
    containerPort: 50053
lifecycle:
  preStop:
    # Until the endpoints are removed, new connections still arrive.
    sleep:
      seconds: 5
volumeMounts:
  # Several workers (DEDUP_WORKERS) combine their metrics here.
  - name: tmp
    mountPath: /tmp
  {{- if .Values.shared.tlsSecretName }}
  - name: tls
    mountPath: /etc/dedup/tls
    readOnly: true
  {{- end }}
{{- end }}

{{- define "dedup.labels" -}}
app.kubernetes.io/name: dedup
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
