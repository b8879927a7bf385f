{{/*
The container. Call it by `dedup.sidecar` or `dedup.shared-container`, with .root, .listen, and
the .settings that this way of running it needs.
*/}}
{{- define "dedup.container" -}}
{{- $values := .root.Values -}}
name: dedup
image: {{ $values.image.repository }}{{ if $values.image.digest }}@{{ $values.image.digest }}{{ else }}:{{ $values.image.tag }}{{ end }}
env:
  - name: DEDUP_LISTEN
    value: {{ .listen }}
  # The kubelet dials the address of the pod, so that a probe reaches neither socket nor loopback.
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
# Neither of these two depends on Redis: a restart would not bring it back.
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
An item of `initContainers`, as a native sidecar, for the chart of an app that has this one as a dependency:
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
The item of `volumes` for it. The app mounts it too, at /run/dedup, and the pod has securityContext.fsGroup: 65532.
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
    # Endpoints are taken away meanwhile. A server that stopped at once would still be sent new connections.
    sleep:
      seconds: 5
volumeMounts:
  # Where more than one worker (DEDUP_WORKERS) adds up its metrics.
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
