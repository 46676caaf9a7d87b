# SPDX-License-Identifier: Apache-2.0
"""The sparse linear operation for OpenVINO's CPU plugin, in C++, compiled on first use."""
