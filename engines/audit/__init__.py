"""The audit of a data set: how well fakes and photographs separate without looking at the picture.

Container and pixel features of a stratified sample, cross-validated probes on them, duplicates,
class balance, the order of labels, and a verdict (pass, warn or fail) with reasons.

* `audit.run_audit`: audit a layout or shards and write the result
* `audit.AuditSettings`: sample, seed, splits, workers
* `gate.audit_line`: the audit that lies beside shards, as training checks it
* `verdict.format_audit`: an audit as plain text
"""
