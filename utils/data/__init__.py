"""From any file to token ids: sources, rows, validation, duplicates, template, dataset."""
