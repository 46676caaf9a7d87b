"""The command line: `--scap` flags of `optimum-cli export openvino`, and `optimum-cli scap`."""
