# SPDX-License-Identifier: Apache-2.0
"""What ``prefault bench`` measures: the cases, and the program that measures them inside the lab."""
