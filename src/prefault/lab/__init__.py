# SPDX-License-Identifier: Apache-2.0
"""The lab: from nothing to a patched arm64 kernel with KVM, and results out of it in seconds.

Read in this order: ``machine`` (QEMU's command line), ``job`` (one run), ``agent`` (what runs
inside), ``rootfs``, ``build`` and ``stock`` (what is booted), ``programs`` (what single jobs want besides),
``debian`` and ``tools`` (where it comes from), ``cache`` (where it is kept).

``agent`` and ``frames`` also run inside the lab: they, and this file, need only the standard library.
"""
