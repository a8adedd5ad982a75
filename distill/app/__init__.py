"""The process: configuration, command line, terminal, files, signals, tracking. It knows no model and no loss."""
