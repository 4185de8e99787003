# SPDX-License-Identifier: Apache-2.0
"""The command ``prefault``: one module per subcommand; main.py holds the frame around them."""
