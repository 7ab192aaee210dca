-- Make the one new epoch of a fork that somebody has found, unless another was quicker or it is not so any more.
-- ARGV: new epoch, the epoch in which it was found, the last number in common (-1: none known), its id
local state = load_state()
local number = tonumber(ARGV[3])
if state.epoch == ARGV[2] and (number < 0 or verify(state, ARGV[2], number, ARGV[4]) == 'ok') then
  state.epoch = NEW_EPOCH
  redis.call('HSET', STATE, 'epoch', NEW_EPOCH)
  if number < 0 then redis.call('DEL', EPOCHS) end
  name_epoch(NEW_EPOCH, number < 0 and '' or text(number))
  notify(state, state.number + 1, 0, state.id, '-', {}, '')
end
return state.epoch
