"""The pack's nodes, one file per group. A node parses its inputs, calls the engine and reports."""
