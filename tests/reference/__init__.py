# SPDX-License-Identifier: Apache-2.0
"""What the kernels and backends are tested against, once and plainly."""
