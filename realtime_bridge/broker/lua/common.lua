-- What every operation shares: this text stands before each of them, and before it PUBLISH, the command to notify with.
-- All keys carry one hash tag, so that they lie in one slot of a cluster. An operation checks everything before its
-- first write: a script that fails half way would leave its first half behind. (What an ACL refuses it cannot know: see
-- acquire.)
local STATE, HISTORY, RELATIONS, USED, EPOCHS, LEASE, RELEASED, TICKETS, TOUCHED, SIGHTS, TOLD, INDEX = unpack(KEYS)
local NEW_EPOCH = ARGV[1] -- the name to use, should this operation have to make an epoch
local EPOCHS_KEPT = 64

-- Lua would write 1e+14.
local function text(number)
  return string.format('%.0f', number)
end

local function name_epoch(epoch, fork)
  redis.call('LPUSH', EPOCHS, epoch .. ' ' .. fork)
  redis.call('LTRIM', EPOCHS, 0, EPOCHS_KEPT - 1)
end

-- Which run of which server this is; '' where the user may not ask.
local function run_of_server()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
end

-- The state; one that is gone makes an epoch without parent, in which nothing older counts.
local function load_state()
  local v = redis.call('HMGET', STATE, 'epoch', 'number', 'id', 'bytes', 'time', 'token', 'nonce', 'watermark', 'proven')
  if not v[1] then
    redis.call('HSET', STATE, 'epoch', NEW_EPOCH, 'number', '0', 'run', run_of_server())
    redis.call('DEL', HISTORY, RELATIONS, USED, EPOCHS, LEASE, SIGHTS, TOLD, INDEX)
    name_epoch(NEW_EPOCH, '')
    v = {NEW_EPOCH}
  end
  return {
    epoch = v[1], number = tonumber(v[2] or 0), id = v[3] or '', bytes = tonumber(v[4] or 0), time = tonumber(v[5] or 0),
    token = v[6] or '', nonce = v[7] or '', watermark = v[8] or '', proven = v[9] or '0',
  }
end

-- Numbers have no holes, so the length tells the first.
local function first_number(state)
  return state.number - redis.call('XLEN', HISTORY) + 1
end

-- An entry's fields by number: {'i', id, 'p', previous id, 't', milliseconds, 'c', bytes of all before it, 'b', body}
local function fields_of(number)
  local found = redis.call('XRANGE', HISTORY, text(number), text(number))
  return found[1] and found[1][2]
end

-- Whether what somebody has seen last is part of this history: 'ok', 'epoch' or 'fork'.
local function verify(state, epoch, number, id)
  if epoch == '' then return 'ok' end
  if epoch ~= state.epoch then return 'epoch' end
  if number > state.number then return 'fork' end
  local here = state.id
  if number < state.number then
    local own, following = fields_of(number), fields_of(number + 1)
    here = (own and own[2]) or (following and following[4]) or id -- trimmed: nothing speaks against it
  end
  return here == id and 'ok' or 'fork'
end

local function head(status, state)
  return {status, state.epoch, state.number, state.id, first_number(state), state.proven, state.watermark}
end

-- Tell the followers. The channel has the history's name. `start` is the first new number, `lengths` those of the
-- bodies, which follow if they are few enough.
local function notify(state, start, count, previous, nonce, lengths, bodies)
  local header = {state.epoch, text(start), text(count), previous == '' and '-' or previous, nonce, state.proven}
  redis.call(PUBLISH, HISTORY, table.concat(header, ' ') .. ' ' .. table.concat(lengths, ' ') .. '\n' .. bodies)
end

-- Go over to a new epoch, which has everything of today's up to a number, or, below 0, nothing that is known of.
local function leave_epoch(state, number)
  state.epoch = NEW_EPOCH
  redis.call('HSET', STATE, 'epoch', NEW_EPOCH)
  if number < 0 then redis.call('DEL', EPOCHS) end
  name_epoch(NEW_EPOCH, number < 0 and '' or text(number))
  notify(state, state.number + 1, 0, state.id, '-', {}, '')
end

-- Remember when a ticket was touched: whatever operation it is of, the ticket is ARGV[2].
local function touch_ticket(now)
  redis.call('ZADD', TOUCHED, now[1] * 1000000 + now[2], ARGV[2])
  redis.call('EXPIRE', TICKETS, ARGV[3])
  redis.call('EXPIRE', TOUCHED, ARGV[3])
end
