{{- define "isthmus.labels" -}}
app.kubernetes.io/name: isthmus
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "isthmus.select" -}}
app.kubernetes.io/name: isthmus
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "isthmus.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "isthmus.pod" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "isthmus.container" -}}
image: {{ include "isthmus.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "isthmus.security" . | nindent 2 }}
{{- end }}

{{- define "isthmus.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* The signing key is copied by an init container: Secret volumes cannot have mode 0600 for another user. */}}
{{- define "isthmus.keys" -}}
- name: keys
  {{- include "isthmus.container" . | nindent 2 }}
  command: [/bin/sh, -c, "umask 077 && cp /signing/signing.key /state/signing.key"]
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    - {name: state, mountPath: /state}
    - {name: signing, mountPath: /signing, readOnly: true}
{{- end }}

{{- define "isthmus.environment" -}}
- name: ISTHMUS_CLOUD_STATE
  value: /state
- name: ISTHMUS_CLOUD_RELEASE
  value: /release/{{ .Values.release.folder }}
- name: ISTHMUS_CLOUD_SIGNING_KEY_FILE
  value: /state/signing.key
- name: ISTHMUS_CLOUD_DATABASE
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.database }}, key: url}}
- name: ISTHMUS_CLOUD_ARTEFACTS
  value: {{ .Values.artefacts.url | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.artefacts.region | quote }}
{{- with .Values.artefacts.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.secrets.artefacts }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- end }}

{{- /* Fronts and workers that compute on the Ray cluster of this release. */}}
{{- define "isthmus.onray" -}}
{{- if .Values.ray.enabled }}
- name: ISTHMUS_CLOUD_EXECUTOR
  value: ray://{{ .Release.Name }}-ray-head-svc:10001
{{ include "isthmus.raytoken" . }}
{{- end }}
{{- end }}

{{- define "isthmus.raytoken" -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.secrets.ray }}, key: token}}
{{- end }}

{{- define "isthmus.settings" -}}
{{- range $name, $value := . }}
- name: ISTHMUS_CLOUD_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
