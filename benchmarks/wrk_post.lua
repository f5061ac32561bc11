-- Creates a payment with each request, as wrk.lua measures it. Each key is new.
dofile("wrk.lua")
local prefix = string.format("%d-%s-", os.time(), tostring({}):match("0x(%x+)"))
local number = 0
local body = '{"amount": 1250, "currency": "EUR", "reference": "order-1"}'

function request()
  number = number + 1
  local headers = {["Content-Type"] = "application/json", ["Idempotency-Key"] = prefix .. number}
  return wrk.format("POST", nil, headers, body)
end
