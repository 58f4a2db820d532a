"""The control plane: an HTTP admin, the workers that hold the sandboxes, and what lies between them.

A **worker** (`worker.py`) is a process that owns backends, and so a supervisor; it outlives its admin. An **admin**
(`control.py`, served by `app.py`) keeps the record of every sandbox in a database, decides who may start what and
where, and compares the record with what the workers hold (`reconcile.py`). They speak over `link.py`.
"""
