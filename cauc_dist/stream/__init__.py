"""From a store to batches: `plan` decides which scans (integers only), `loader` reads them ahead of the step."""
