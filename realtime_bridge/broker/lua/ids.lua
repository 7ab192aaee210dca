-- An entry's id and its predecessor's, without its body; nothing if it is not held.
-- ARGV: new epoch, number
local fields = fields_of(tonumber(ARGV[2]))
return fields and {fields[2], fields[4]} or {}
