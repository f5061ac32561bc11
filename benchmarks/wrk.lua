-- Prints the counts of wrk as one line of JSON. It hooks into the end only, never into a request.
function done(summary, latency)
  local failed = {}
  for _, kind in ipairs({"connect", "read", "write", "status", "timeout"}) do
    failed[#failed + 1] = string.format('"%s": %d', kind, summary.errors[kind])
  end
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p99_ms": %.3f, "failed": {%s}}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(99) / 1e3, table.concat(failed, ", ")))
end
