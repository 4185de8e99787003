# SPDX-License-Identifier: Apache-2.0
"""What people read: tables and sentences made from results. Nothing here measures anything."""
