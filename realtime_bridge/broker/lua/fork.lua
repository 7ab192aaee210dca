-- Make the one new epoch of a fork that somebody has found, unless another was quicker or it is not so any more.
-- ARGV: new epoch, the epoch in which it was found, the last number in common (-1: none known), its id
local state = load_state()
local number = tonumber(ARGV[3])
if state.epoch == ARGV[2] and (number < 0 or verify(state, ARGV[2], number, ARGV[4]) == 'ok') then
  leave_epoch(state, number)
end
return state.epoch
